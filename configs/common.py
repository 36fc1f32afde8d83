"""What every stage-1 and stage-2 config starts from; the published values where one exists."""

from ml_collections import config_dict


def base() -> config_dict.ConfigDict:
  c = config_dict.ConfigDict()
  c.stage = ""
  c.seed = 42

  c.model = config_dict.ConfigDict()
  # A diffusers directory, or a repository of Hugging Face's hub as org/name[@revision].
  c.model.pretrained = ""
  # A role's own transformer (likewise, or a file); empty: that of `pretrained`.
  c.model.generator_init = ""
  c.model.fake_score_init = ""
  c.model.teacher_init = ""
  c.model.image_size = 512
  c.model.dtype = "bfloat16"  # of the frozen networks
  # Kernels of the transformers: "native" keeps `dtype`, "int8" one byte a weight and one float32
  # scale an output channel.
  c.model.base_storage = "native"
  # The kernels of transformers and text encoders stay in the memory of the hosts and travel to the
  # devices block by block.
  c.model.offload = False
  # What is kept of a block, of transformers and decoder, for the backward pass: everything, "dots"
  # (weight products), or, with "full", nothing but its input.
  c.model.remat = "none"
  # Of the velocity networks: "auto" is "splash" on TPUs, "cudnn" on GPUs and "xla" elsewhere.
  c.model.attention = "auto"

  # Devices along each axis (-1: all that are left); see docs/sharding.md.
  c.mesh = config_dict.ConfigDict()
  c.mesh.data = 1
  c.mesh.fsdp = -1
  c.mesh.tensor = 1

  c.lora = config_dict.ConfigDict()
  c.lora.rank = 32
  c.lora.alpha = 64.0
  # Deviation of `a`: 1/rank ("gaussian", PEFT's), 1 ("normal") or rank**-0.5 ("rsqrt").
  c.lora.init = "gaussian"
  # Of the adapters in training, their gradients and their moments; "bfloat16" as published.
  c.lora.dtype = "float32"
  c.lora.targets = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
  )  # fmt: skip

  # Adapters of an earlier stage (PEFT directories), kept frozen below the ones in training.
  c.load = config_dict.ConfigDict()
  c.load.generator = ""
  c.load.fake_score = ""

  c.data = config_dict.ConfigDict()
  c.data.prompts = ""
  c.data.held_out = ""
  c.data.cache_gb = 1.0  # of host memory for encodings of prompts, the last used ones

  c.dmd = config_dict.ConfigDict()
  c.dmd.timesteps = (1000, 750, 500, 250)
  c.dmd.objective = "ac_dmd"  # or "dmd"
  c.dmd.eta = 0.9
  c.dmd.guidance_low = 4.5
  c.dmd.guidance_high = 4.5
  c.dmd.start_mode = "next_sigma"  # or "fixed_boundary"
  c.dmd.boundary_index = 2
  c.dmd.offset = 10.0
  c.dmd.end = 1000.0
  c.dmd.min_step = 20.0
  c.dmd.max_step = 980.0
  c.dmd.inside = False  # True: no point mass of renoise levels at max_step
  c.dmd.normalize = True
  c.dmd.scale_out = True
  c.dmd.weight_low = 0.0
  c.dmd.weight_high = 10.0
  c.dmd.consistency = config_dict.ConfigDict()
  c.dmd.consistency.weight = 0.01
  c.dmd.consistency.max_steps_back = 200
  c.dmd.consistency.transitions = 1
  c.dmd.consistency.two_sample = True
  c.dmd.consistency.stop_transitions = True
  c.dmd.consistency.adjacent = False  # True: the paper's adjacent schedule points

  c.generator = _optimizer(3e-5)
  c.fake_score = _optimizer(3e-5)

  c.ema = config_dict.ConfigDict()
  c.ema.decay = 0.99
  c.ema.every = 1  # after the steps n with n + 1 divisible by this
  c.ema.warmup = False  # True: the decay is (1 + n) / (10 + n) while that is less
  c.ema.applications = 1  # of the decay, each time

  c.batch = config_dict.ConfigDict()
  c.batch.prompts = 72
  c.batch.images_per_prompt = 1
  c.batch.micro_batches = 1  # parts whose gradients are added up, for memory

  c.train = config_dict.ConfigDict()
  c.train.steps = 15_000
  c.train.fake_update_ratio = 10  # fake-score updates for each of the generator
  c.train.log_every = 10
  c.train.save_every = 1000
  c.train.keep = 3  # newest checkpoints that stay
  c.train.keep_every = 0  # steps divisible by this stay too; 0: none
  c.train.check_numbers = False  # stop at the first NaN and name its line; slow
  c.train.max_skipped = 20  # updates in a row without a finite gradient end the run
  c.train.profile_start = 10  # first step of a profile in the workdir (docs/troubleshooting.md)
  c.train.profile_steps = 0  # its length; 0: none
  c.train.grace_seconds = 120.0  # after SIGTERM or Ctrl-C, to finish the step and save

  c.eval = config_dict.ConfigDict()
  c.eval.every = 1000  # steps between scores of held-out prompts during training
  c.eval.prompts = 64  # held-out prompts scored then
  c.eval.final_prompts = 1000  # at the end; fewer if there are fewer
  c.eval.final_images = 1  # of each of them
  c.eval.chunk = 16  # images sampled at once
  c.eval.teacher_steps = 50
  c.eval.teacher_guidance = 4.5
  c.eval.seed = 42
  # Rewards that are scored then and at the end, but not trained: signs of reward hacking.
  c.eval.rewards = config_dict.ConfigDict(allow_dotted_keys=True)
  c.eval.preview = 12  # prompts of the preview grid and of the report's images

  c.log = config_dict.ConfigDict()
  c.log.wandb = False  # also log to Weights & Biases; pip install -e ".[wandb]"
  c.log.wandb_project = "rtdmd_jax"

  c.rewards = config_dict.ConfigDict(allow_dotted_keys=True)
  return c


def stage2() -> config_dict.ConfigDict:
  c = base()
  c.stage = "stage2"
  c.generator.learning_rate = 3e-6
  c.generator.weight_decay = 1e-4
  # The published loop averages the same parameters in 16 times, once per 8 optimizer steps.
  c.ema.decay = 0.9
  c.ema.every = 8
  c.ema.warmup = True
  c.ema.applications = 16
  c.batch.prompts = 48
  c.batch.images_per_prompt = 24
  # Images that a device decodes and scores at once, for memory; 0: its part of a micro-batch.
  c.batch.decode_chunk = 0
  c.train.steps = 1000
  c.train.fake_update_ratio = 1
  c.eval.every = 50

  c.policy = config_dict.ConfigDict()
  c.policy.num_train_steps = 2
  c.policy.range_start = 0
  c.policy.range_end = 2
  # Of the reported drift alone: the ratio that trains is exactly 1 (docs/architecture.md).
  c.policy.clip_low = 1e-5
  c.policy.clip_high = 1e-5
  c.policy.advantage_limit = 5.0
  c.policy.kl_weight = 0.0
  c.policy.subset_factor = False  # True: the paper's (K - 1) / M
  c.policy.gaussian_log_prob = False  # True: the paper's log-probability
  c.policy.per_prompt = True
  c.policy.global_std = True
  c.policy.weight_advantages = True
  c.policy.policy_weight = 1.0
  c.policy.dmd_weight = 1e-3
  c.policy.reward_weight = 1e-4
  c.policy.reward_margin = 3.0
  return c


def stage1() -> config_dict.ConfigDict:
  c = base()
  c.stage = "stage1"
  return c


def _rewards() -> config_dict.ConfigDict:
  """Rewards by name; an import path such as "pkg.module:Name" holds dots."""
  return config_dict.ConfigDict(allow_dotted_keys=True)


def _optimizer(learning_rate: float) -> config_dict.ConfigDict:
  c = config_dict.ConfigDict()
  c.learning_rate = learning_rate
  c.warmup_steps = 0
  c.b1 = 0.9
  c.b2 = 0.999
  c.eps = 1e-8
  c.weight_decay = 0.0
  c.clip_norm = 1.0
  return c
