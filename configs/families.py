"""What differs between the five published backbones, and the configs of each stage.

Models are repositories of Hugging Face's hub, which are looked for below `checkpoints/` and in the
hub's cache before they are downloaded; prompt sets lie below `prompts/`. docs/backbones.md and
docs/data.md list where each comes from.
"""

from typing import NamedTuple

import common
from ml_collections import config_dict

PROMPTS = "prompts"
_KLEIN_TARGETS = (
  "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
  "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
  "attn.to_qkv_mlp_proj", "attn.to_out",
)  # fmt: skip


class Family(NamedTuple):
  """Published values of one backbone; levels of guidance are the teacher's."""

  pretrained: str
  guidance: float
  generator_init: str = ""
  targets: tuple[str, ...] | None = None
  stage1_rate: float = 3e-5
  stage2_fake_rate: float = 3e-5
  image_size: int = 512
  prompts: int = 64
  repeats: int = 24
  stage2_consistency: bool = True
  stage2_save_every: int = 100
  stage2_micro_batches: int = 48


FAMILIES = {
  "sd3": Family(
    "stabilityai/stable-diffusion-3-medium-diffusers", 7.0, image_size=1024, prompts=32, repeats=16,
    stage2_micro_batches=16,
  ),
  "sd35": Family(
    "stabilityai/stable-diffusion-3.5-medium", 4.5, prompts=48, stage2_micro_batches=16
  ),
  "flux1": Family(
    "black-forest-labs/FLUX.1-dev", 3.5, stage2_fake_rate=1e-6, stage2_consistency=False,
    stage2_save_every=50,
  ),
  "flux2": Family(
    "black-forest-labs/FLUX.2-klein-base-4B", 4.0, "black-forest-labs/FLUX.2-klein-4B",
    _KLEIN_TARGETS, 1e-6, 1e-6,
  ),
  "flux2_9b": Family(
    "black-forest-labs/FLUX.2-klein-base-9B", 4.0, "black-forest-labs/FLUX.2-klein-9B",
    _KLEIN_TARGETS, 1e-6, 1e-6, stage2_consistency=False, stage2_save_every=50,
  ),
}  # fmt: skip


def stage1(name: str) -> config_dict.ConfigDict:
  """AC-DMD of a family of `FAMILIES`."""
  family = FAMILIES[name]
  c = _model(common.stage1(), family)
  c.data.prompts = f"{PROMPTS}/pickscore"
  c.data.held_out = f"{PROMPTS}/drawbench"
  c.generator.learning_rate = c.fake_score.learning_rate = family.stage1_rate
  c.batch.micro_batches = 9  # of 8 images
  c.train.save_every = 5000
  for reward in ("clipscore", "pickscore", "hpsv2", "aesthetic", "imagereward"):
    c.rewards[reward] = _device_reward(reward)
  return c


def stage2(name: str) -> config_dict.ConfigDict:
  """RTDMD of a family of `FAMILIES`, on top of `runs/<name>_stage1`."""
  family = FAMILIES[name]
  c = _model(common.stage2(), family)
  c.lora.init = "normal"  # as published for fresh adapters on top of stage 1's
  c.load.generator = f"runs/{name}_stage1/export/generator"
  c.load.fake_score = f"runs/{name}_stage1/export/fake_score"
  c.data.prompts = f"{PROMPTS}/geneval"
  c.data.held_out = f"{PROMPTS}/drawbench"
  c.fake_score.learning_rate = family.stage2_fake_rate
  if not family.stage2_consistency:
    c.dmd.consistency.weight = 0.0
  c.batch.prompts, c.batch.repeats = family.prompts, family.repeats
  c.batch.micro_batches = family.stage2_micro_batches
  c.batch.decode_chunk = 1
  c.train.save_every = family.stage2_save_every
  for reward in ("clipscore", "hpsv2", "pickscore"):
    c.rewards[reward] = _device_reward(reward, backpropagate=True)
  # Served by `python -m rtdmd_jax.rewards.serve` or a compatible service.
  c.rewards.geneval = config_dict.ConfigDict(dict(weight=1.0, url="http://127.0.0.1:18085"))
  return c


def infer(name: str) -> config_dict.ConfigDict:
  """Four steps at 1024 px with the adapters of both stages."""
  family = FAMILIES[name]
  c = config_dict.ConfigDict()
  c.pipeline = family.generator_init or family.pretrained
  c.dtype = "bfloat16"
  c.height = c.width = 1024
  c.few_step = True  # False: Euler steps, for the base with guidance
  c.steps = 4
  c.eta = 0.9
  c.guidance = 1.0
  c.seed = 42
  # Stage 2 exports one adapter that holds stage 1's as well.
  c.loras = ({"path": f"runs/{name}_stage2/export/generator", "scale": 1.0},)
  c.batch = 4
  c.out = f"runs/{name}_infer"
  return c


def evaluation(name: str) -> config_dict.ConfigDict:
  """The published suite: base, cold start and result by nine rewards, each on its prompts.

  Of FLUX.2-klein the base is the teacher, and the distilled network that training starts from is a
  system of its own.
  """
  family, drawn = FAMILIES[name], infer(name)
  c = config_dict.ConfigDict()
  for key in ("pipeline", "dtype", "height", "width", "seed", "batch"):
    c[key] = drawn[key]
  c.preview = 24
  c.limit = 0  # prompts of each set; 0: all
  sets = ("drawbench", "hpsv3", "geneval", "geneval2", "ocr")
  c.prompts = config_dict.ConfigDict({key: f"{PROMPTS}/{key}" for key in sets})
  few = dict(few_step=True, steps=4, guidance=1.0)
  lora = lambda stage: ({"path": f"runs/{name}_{stage}/export/generator", "scale": 1.0},)  # noqa: E731
  c.systems = config_dict.ConfigDict()
  c.systems.base = dict(few_step=False, steps=50, guidance=family.guidance, loras=())
  if family.generator_init:
    c.systems.base.pipeline = family.pretrained
    # As its authors draw it: four Euler steps without guidance.
    c.systems.distilled = dict(few_step=False, steps=4, guidance=1.0, loras=())
  c.systems.cold_start = dict(**few, loras=lora("stage1"))
  c.systems.result = dict(**few, loras=lora("stage2"))
  c.rewards = config_dict.ConfigDict()
  for reward in ("pickscore", "aesthetic", "clipscore", "hpsv2", "imagereward"):
    c.rewards[reward] = _device_reward(reward, prompts="drawbench", compat=True)
    del c.rewards[reward].weight
  c.rewards.ocr = dict(prompts="ocr")
  # Served by `python -m rtdmd_jax.rewards.serve` or a compatible service.
  for reward, port in (("geneval", 18085), ("geneval2", 18086), ("hpsv3", 18087)):
    c.rewards[reward] = dict(prompts=reward, url=f"http://127.0.0.1:{port}")
  return c


def _model(c: config_dict.ConfigDict, family: Family) -> config_dict.ConfigDict:
  c.model.pretrained = family.pretrained
  c.model.generator_init = family.generator_init
  c.model.image_size = family.image_size
  c.model.remat = "full"
  if family.targets:
    c.lora.targets = family.targets
  c.dmd.guidance_low = c.dmd.guidance_high = c.eval.teacher_guidance = family.guidance
  return c


def _device_reward(name: str, **options) -> config_dict.ConfigDict:
  clip_l, clip_h = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
  paths = {
    "clipscore": {"directory": clip_l},
    "pickscore": {"directory": "yuvalkirstain/PickScore_v1", "processor": clip_h},
    "hpsv2": {"weights": "xswu/HPSv2/HPS_v2.1_compressed.pt", "directory": clip_h},
    "aesthetic": {
      # Of GitHub.
      "weights": "christophschuhmann/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth",
      "directory": clip_l,
    },
    "imagereward": {
      "weights": "zai-org/ImageReward/ImageReward.pt",
      "tokenizer": "google-bert/bert-base-uncased",
    },
  }[name]
  return config_dict.ConfigDict(dict(weight=1.0, dtype="float32", **paths, **options))
