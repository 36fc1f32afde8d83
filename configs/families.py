"""What differs between the five published backbones, and the configs of each stage.

Models are repositories of Hugging Face's hub, which are looked for below `checkpoints/` and in the
hub's cache before they are downloaded; prompt sets lie below `prompts/`. docs/backbones.md and
docs/data.md list where each comes from.
"""

from typing import NamedTuple

import common
import gpus
from ml_collections import config_dict

from rtdmd_jax.errors import UserError

PROMPTS = "prompts"
_KLEIN_TARGETS = (
  "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
  "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
  "attn.to_qkv_mlp_proj", "attn.to_out",
)  # fmt: skip


# The held-out prompts of each reward (the original's `reward_dataset_map`).
HELD_OUT = {
  "pickscore": "drawbench",
  "aesthetic": "drawbench",
  "clipscore": "drawbench",
  "hpsv2": "drawbench",
  "imagereward": "drawbench",
  "hpsv3": "hpsv3",
  "geneval": "geneval",
  "geneval2": "geneval2",
  "ocr": "ocr",
}
# Ports of the rewards served by `python -m rtdmd_jax.rewards.serve` or a compatible service.
_PORTS = {"geneval": 18085, "geneval2": 18086, "hpsv3": 18087}
# Files of the rewards on the device; that of aesthetic is on GitHub.
_CLIP_L, _CLIP_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_FILES = {
  "clipscore": {"directory": _CLIP_L},
  "pickscore": {"directory": "yuvalkirstain/PickScore_v1", "processor": _CLIP_H},
  "hpsv2": {"weights": "xswu/HPSv2/HPS_v2.1_compressed.pt", "directory": _CLIP_H},
  "aesthetic": {
    "weights": "christophschuhmann/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth",
    "directory": _CLIP_L,
  },
  "imagereward": {
    "weights": "zai-org/ImageReward/ImageReward.pt",
    "tokenizer": "google-bert/bert-base-uncased",
  },
}
# What the cold starts of all families were evaluated by.
_COLD_START = ("imagereward", "pickscore", "aesthetic", "clipscore", "hpsv2", "hpsv3", "ocr")


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
  images_per_prompt: int = 24
  stage2_consistency: bool = True
  stage2_save_every: int = 100
  stage2_micro_batches: int = 48
  cold_start: tuple[str, ...] = _COLD_START


FAMILIES = {
  "sd3": Family(
    "stabilityai/stable-diffusion-3-medium-diffusers", 7.0, image_size=1024, prompts=32,
    images_per_prompt=16, stage2_micro_batches=16, cold_start=(*_COLD_START, "geneval", "geneval2"),
  ),
  "sd35": Family(
    "stabilityai/stable-diffusion-3.5-medium", 4.5, prompts=48, stage2_micro_batches=16,
    cold_start=(*_COLD_START, "geneval", "geneval2"),
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


def stage1(name: str, which: str = "") -> config_dict.ConfigDict:
  """AC-DMD of a family of `FAMILIES`, which needs no reward.

  Args:
    name: the family.
    which: "scored" for the published held-out rewards, in evaluations alone, a set-up of
      `gpus.SETUPS`, both with a comma between, or "" for none.

  Raises:
    UserError: another `which`.
  """
  words = _words(f"{name}_stage1", which, ("scored", *gpus.SETUPS))
  family = FAMILIES[name]
  c = _model(common.stage1(), family)
  c.data.prompts = f"{PROMPTS}/pickscore"
  c.data.held_out = f"{PROMPTS}/drawbench"
  c.generator.learning_rate = c.fake_score.learning_rate = family.stage1_rate
  c.batch.micro_batches = 9  # of 8 images
  c.train.save_every = 5000
  if "scored" in words:
    _watch(c, family.cold_start)
  for setup in words - {"scored"}:
    gpus.apply(c, name, setup)
  return c


def stage2(name: str, which: str = "") -> config_dict.ConfigDict:
  """RTDMD of a family of `FAMILIES`, on top of `runs/<name>_stage1`.

  Args:
    name: the family.
    which: a set-up of `gpus.SETUPS`, or "" for none.

  Raises:
    UserError: another `which`.
  """
  words = _words(f"{name}_stage2", which, gpus.SETUPS)
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
  c.batch.prompts, c.batch.images_per_prompt = family.prompts, family.images_per_prompt
  c.batch.micro_batches = family.stage2_micro_batches
  c.batch.decode_chunk = 1
  c.train.save_every = family.stage2_save_every
  for reward in ("clipscore", "hpsv2", "pickscore"):
    c.rewards[reward] = _reward(reward, weight=1.0, backpropagate=True)
  c.rewards.geneval = _reward("geneval", weight=1.0, held_out=f"{PROMPTS}/geneval")
  _watch(c, [reward for reward in HELD_OUT if reward not in c.rewards])
  for setup in words:
    gpus.apply(c, name, setup)
  return c


def _words(config: str, which: str, known: tuple[str, ...]) -> set[str]:
  """The words of a configuration's argument."""
  words = set(which.split(",")) - {""}
  if words - set(known) or len(words & set(gpus.SETUPS)) > 1:
    raise UserError(
      f"configs/{config}.py takes the arguments {', '.join(known)} (one set-up of GPUs), or none,"
      f" but not {which!r}."
    )
  return words


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
  sets = dict.fromkeys(HELD_OUT.values())
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
  c.rewards = config_dict.ConfigDict(allow_dotted_keys=True)
  for reward, prompts in HELD_OUT.items():
    compat = {"compat": True} if reward in _FILES else {}
    c.rewards[reward] = _reward(reward, prompts=prompts, **compat)
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


def _watch(c: config_dict.ConfigDict, rewards) -> None:
  """Rewards that a run evaluates and does not train, each on its own held-out prompts."""
  for reward in rewards:
    path = f"{PROMPTS}/{HELD_OUT[reward]}"
    own = {} if path == c.data.held_out else {"held_out": path}
    c.eval.rewards[reward] = _reward(reward, **own)


def _reward(name: str, **options) -> config_dict.ConfigDict:
  """Section of a reward: where its files or its service are, and `options`."""
  where = dict(_FILES.get(name, {}))
  if name in _FILES:
    where["dtype"] = "float32"
  elif name in _PORTS:
    where["url"] = f"http://127.0.0.1:{_PORTS[name]}"
  return config_dict.ConfigDict(dict(**where, **options))
