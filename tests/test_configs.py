"""The published hyper-parameters of each backbone (RTDMD's released configurations)."""

from pathlib import Path

import jax
import numpy as np
import pytest

from rtdmd_jax.adapters import lora
from rtdmd_jax.config import flatten, load_config
from rtdmd_jax.errors import UserError
from rtdmd_jax.evaluate.suite import settings
from rtdmd_jax.models import build_transformer
from rtdmd_jax.rewards import device_rewards
from tests.support.paths import CONFIGS

NETWORKS = {
  "sd35": {"_class_name": "SD3Transformer2DModel", "num_layers": 24, "qk_norm": "rms_norm",
           "num_attention_heads": 24, "caption_projection_dim": 1536,
           "dual_attention_layers": tuple(range(13))},
  "flux1": {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
  "flux2": {"_class_name": "Flux2Transformer2DModel", "num_layers": 5, "num_single_layers": 20,
            "num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False},
  "flux2_9b": {"_class_name": "Flux2Transformer2DModel", "num_layers": 8, "num_single_layers": 24,
               "num_attention_heads": 32, "joint_attention_dim": 12288, "guidance_embeds": False},
}  # fmt: skip


FAMILIES = ("sd3", "sd35", "flux1", "flux2", "flux2_9b")
ADAMW = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "clip_norm": 1.0, "warmup_steps": 0}
# The released YAML files, under our keys. A list has a value for each of FAMILIES.
BOTH = {
  "seed": 42,
  "model.pretrained": [
    "stable-diffusion-3-medium-diffusers", "stable-diffusion-3.5-medium", "FLUX.1-dev",
    "FLUX.2-klein-base-4B", "FLUX.2-klein-base-9B",
  ],
  "model.generator_init": ["", "", "", "FLUX.2-klein-4B", "FLUX.2-klein-9B"],
  # Empty, or the path of the pretrained one.
  "model.fake_score_init": "",
  "model.teacher_init": "",
  "model.image_size": [1024, 512, 512, 512, 512],
  "model.dtype": "bfloat16",
  "lora.rank": 32,
  "lora.alpha": 64.0,
  "dmd.timesteps": (1000, 750, 500, 250),
  "dmd.objective": "ac_dmd",
  "dmd.eta": 0.9,
  "dmd.guidance_low": [7.0, 4.5, 3.5, 4.0, 4.0],
  "dmd.guidance_high": [7.0, 4.5, 3.5, 4.0, 4.0],
  "dmd.start_mode": "next_sigma",
  "dmd.boundary_index": 2,
  "dmd.offset": 10.0,
  "dmd.end": 1000.0,
  "dmd.min_step": 20.0,
  "dmd.max_step": 980.0,
  "dmd.inside": False,
  "dmd.normalize": True,
  "dmd.scale_out": True,
  "dmd.weight_low": 0.0,
  "dmd.weight_high": 10.0,
  "dmd.consistency.max_steps_back": 200,
  "dmd.consistency.transitions": 1,
  "dmd.consistency.two_sample": True,
  "dmd.consistency.stop_transitions": True,
  "dmd.consistency.adjacent": False,
  **{f"generator.{key}": value for key, value in ADAMW.items()},
  **{f"fake_score.{key}": value for key, value in ADAMW.items()},
  "fake_score.weight_decay": 0.0,
  "eval.seed": 42,
}  # fmt: skip
PUBLISHED = {
  "stage1": {
    "lora.init": "gaussian",
    "dmd.consistency.weight": 0.01,
    "generator.learning_rate": [3e-5, 3e-5, 3e-5, 1e-6, 1e-6],
    "fake_score.learning_rate": [3e-5, 3e-5, 3e-5, 1e-6, 1e-6],
    "generator.weight_decay": 0.0,
    "ema.decay": 0.99,
    "ema.every": 1,
    "ema.warmup": False,
    "ema.applications": 1,
    "batch.prompts": 9 * 8,  # of a GPU, GPUs
    "batch.images_per_prompt": 1,
    "train.fake_update_ratio": 10,
    "train.save_every": 5000,
    "eval.every": 1000,
  },
  "stage2": {
    "lora.init": "normal",  # the released code's, whatever the YAML says, on top of merged adapters
    "dmd.consistency.weight": [0.01, 0.01, 0.0, 0.01, 0.0],
    "generator.learning_rate": 3e-6,
    "fake_score.learning_rate": [3e-5, 3e-5, 1e-6, 1e-6, 1e-6],
    "generator.weight_decay": 1e-4,
    "ema.decay": 0.9,
    "ema.every": 8,
    "ema.warmup": True,
    "ema.applications": 16,
    # Of a GPU, GPUs (the README's), batches an epoch, over images of a prompt.
    "batch.prompts": [
      2 * 16 * 16 // 16, 9 * 8 * 16 // 24, 3 * 32 * 16 // 24, 6 * 16 * 16 // 24, 3 * 32 * 16 // 24,
    ],
    "batch.images_per_prompt": [16, 24, 24, 24, 24],
    "train.save_every": [100, 100, 50, 100, 50],
    "eval.every": 50,
    "policy.num_train_steps": 2,
    "policy.range_start": 0,
    "policy.range_end": 2,
    "policy.clip_low": 1e-5,
    "policy.clip_high": 1e-5,
    "policy.advantage_limit": 5.0,
    "policy.kl_weight": 0.0,
    "policy.subset_factor": False,
    "policy.gaussian_log_prob": False,
    "policy.per_prompt": True,
    "policy.global_std": True,
    "policy.weight_advantages": True,
    "policy.policy_weight": 1.0,
    "policy.dmd_weight": 1e-3,
    "policy.reward_weight": 1e-4,
    "policy.reward_margin": 3.0,
  },
}  # fmt: skip
# Rows of docs/published.md: published and ours, as they stand there.
DIFFERENT = {
  "lora.dtype": ("bfloat16", "float32"),
  "train.steps": ("100,000", "15,000, then 1,000"),
  "train.log_every": ("1", "10"),
  "train.keep": ("all", "3"),
  "eval.prompts": ("all", "64"),
  "eval.preview": ("64; SD3-M's stage 1: 8", "12"),
}
# How a run is computed or watched, without a published counterpart, or not read by a stage.
# The layers that lora.targets chooses are counted below.
OURS_ALONE = {
  *("lora.targets", "train.fake_update_ratio"),
  *("batch.micro_batches", "batch.decode_chunk", "eval.chunk"),
  *(f"model.{key}" for key in ("base_storage", "offload", "remat", "attention")),
  *(f"train.{key}" for key in ("keep_every", "check_numbers", "max_skipped", "grace_seconds")),
  *("train.profile_start", "train.profile_steps"),
  *(f"eval.{key}" for key in ("final_prompts", "final_images", "teacher_steps")),
  "eval.teacher_guidance",
}
# What names files, rewards and devices, or is the stage.
ELSEWHERE = ("stage", "load", "data", "log", "mesh", "rewards", "eval.rewards")


def _load(name):
  return load_config(str(CONFIGS / f"{name}.py"))


@pytest.mark.parametrize("stage", PUBLISHED)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_hyper_parameter_is_the_published_one_or_a_row_of_the_page(family, stage):
  config = dict(flatten(_load(f"{family}_{stage}").to_dict()))
  table = BOTH | PUBLISHED[stage]
  expected = {
    key: value[FAMILIES.index(family)] if isinstance(value, list) else value
    for key, value in table.items()
  }
  ours = {
    key: Path(value).name if key in ("model.pretrained", "model.generator_init") else value
    for key, value in config.items()
    if not any(f"{key}.".startswith(f"{section}.") for section in ELSEWHERE)
  }
  assert {key: value for key, value in ours.items() if key in expected} == expected
  assert ours.keys() - expected.keys() - OURS_ALONE - DIFFERENT.keys() == set()


DRAWBENCH = {"pickscore", "aesthetic", "clipscore", "hpsv2", "imagereward"}
OWN = {"hpsv3", "geneval", "geneval2", "ocr"}


def _held_out(config):
  """The prompts on which a training config scores each reward."""
  return {
    name: options.get("held_out", config.data.held_out)
    for section in (config.rewards, config.eval.rewards)
    for name, options in section.items()
  }


@pytest.mark.parametrize("family", FAMILIES)
def test_each_reward_is_evaluated_on_its_published_prompts(family):
  published = dict.fromkeys(DRAWBENCH, "prompts/drawbench") | {n: f"prompts/{n}" for n in OWN}
  assert _held_out(_load(f"{family}_stage2")) == published
  suite = _load(f"{family}_eval")
  assert {n: suite.prompts[r.prompts] for n, r in suite.rewards.items()} == published
  assert _held_out(_load(f"{family}_stage1")) == {}
  scored = load_config(str(CONFIGS / f"{family}_stage1.py:scored"))
  absent = set() if family in ("sd3", "sd35") else {"geneval", "geneval2"}
  assert not scored.rewards
  assert _held_out(scored) == {n: p for n, p in published.items() if n not in absent}
  with pytest.raises(UserError, match="takes the arguments scored, .* but not 'score'"):
    load_config(str(CONFIGS / f"{family}_stage1.py:score"))


@pytest.mark.parametrize("key", DIFFERENT)
def test_the_page_says_what_differs(key):
  published, ours = DIFFERENT[key]
  text = (CONFIGS.parent / "docs/published.md").read_text()
  assert f"| `{key}` | {published} | {ours} |" in text
  values = [dict(flatten(_load(f"sd35_{stage}").to_dict()))[key] for stage in PUBLISHED]
  found = [f"{value:,}" if isinstance(value, int) else value for value in dict.fromkeys(values)]
  assert ", then ".join(found) == ours


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_are_computed_in_float32_as_published(family):
  for kind in ("stage1", "stage2", "eval"):
    config = _load(f"{family}_{kind}")
    for rewards in (config.rewards, config.get("eval", {}).get("rewards", {})):
      for name in set(rewards) & set(device_rewards.NAMES):
        assert rewards[name].dtype == "float32"
  rewards = _load(f"{family}_stage2").rewards
  assert {name: reward.weight for name, reward in rewards.items()} == dict.fromkeys(
    ("clipscore", "hpsv2", "pickscore", "geneval"), 1.0
  )
  trained = {name for name, reward in rewards.items() if reward.get("backpropagate")}
  assert trained == {"clipscore", "hpsv2", "pickscore"}


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_drawn_as_published(family):
  infer = _load(f"{family}_infer")
  values = dict(height=1024, width=1024, dtype="bfloat16", steps=4, eta=0.9, guidance=1.0, seed=42)
  assert {key: infer[key] for key in values} == values
  assert (infer.few_step, infer.batch) == (True, 4)
  model = _load(f"{family}_stage1").model
  assert infer.pipeline == (model.generator_init or model.pretrained)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_suite_compares_the_published_systems_with_the_published_preprocessing(family):
  suite, training = _load(f"{family}_eval"), _load(f"{family}_stage1")
  drawn = {name: settings(suite, name) for name in suite.systems}
  base, distilled = drawn["base"], training.model.generator_init
  assert (base.steps, base.guidance, base.few_step) == (50, training.dmd.guidance_low, False)
  assert base.pipeline == training.model.pretrained and not base.loras
  for name in ("cold_start", "result"):
    how = drawn[name]
    assert (how.steps, how.guidance, how.eta, how.few_step) == (4, 1.0, 0.9, True)
    assert how.pipeline == (distilled or training.model.pretrained) and how.loras
  assert ("distilled" in drawn) == bool(distilled)
  if distilled:
    how = drawn["distilled"]
    assert (how.pipeline, how.steps, how.guidance) == (distilled, 4, 1.0)
    assert not how.few_step and not how.loras
  sets = dict.fromkeys(("pickscore", "aesthetic", "clipscore", "hpsv2", "imagereward"), "drawbench")
  sets |= {name: name for name in ("hpsv3", "geneval", "geneval2", "ocr")}
  assert {name: reward.prompts for name, reward in suite.rewards.items()} == sets
  assert all(suite.rewards[name].compat for name in set(sets) & set(device_rewards.NAMES))


@pytest.mark.parametrize(
  "family, layers", [("sd35", 191), ("flux1", 266), ("flux2", 80), ("flux2_9b", 112)]
)
def test_adapters_sit_on_as_many_layers_as_published(family, layers):
  transformer = build_transformer(NETWORKS[family])
  params = jax.eval_shape(transformer.init, jax.random.key(0))
  entries = lora.target_entries(params, transformer.table, _load(f"{family}_stage2").lora.targets)
  assert sum(len(lora.module_names(entry)) for entry in entries) == layers
  assert np.all([len(entry.shape) == 2 for entry in entries])


GPU_SETUPS = ("1x80", "1x141", "8x80")
WITHOUT_ROOM = ("flux2_9b", "stage2", "1x80")


@pytest.mark.parametrize("setup", GPU_SETUPS)
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_settings_for_gpus_split_the_published_batch(family, stage, setup):
  """They change nothing else, and every part divides over the devices."""
  name = f"{CONFIGS / family}_{stage}.py"
  if (family, stage, setup) == WITHOUT_ROOM:
    with pytest.raises(UserError, match=r"does not fit 1x80 GB.* Use 1x141 or 8x80, or model"):
      load_config(f"{name}:{setup}")
    return
  published, own = load_config(name), load_config(f"{name}:{setup}")
  before, after = (dict(flatten(config.to_dict())) for config in (published, own))
  changed = {key for key in before if before[key] != after[key]}
  keys = {"batch.micro_batches", "batch.decode_chunk", "mesh.data", "mesh.fsdp"}
  assert changed <= keys and before.keys() == after.keys()
  devices = int(setup[0])
  images, rest = divmod(
    own.batch.prompts * own.batch.images_per_prompt, own.batch.micro_batches * devices
  )
  assert not rest and not images % own.batch.get("decode_chunk", 1)
  assert devices % own.mesh.fsdp == 0


@pytest.mark.parametrize("which", ["2x80", "1x80,8x80", "scored,rescored"])
def test_an_argument_that_no_configuration_has(which):
  with pytest.raises(UserError, match=f"takes the arguments .*but not '{which}'"):
    load_config(f"{CONFIGS / 'sd35_stage1.py'}:{which}")
  both = load_config(f"{CONFIGS / 'sd35_stage1.py'}:scored,1x80")
  assert both.batch.micro_batches == 1 and both.eval.rewards
