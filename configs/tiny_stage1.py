"""AC-DMD on the shipped tiny pipeline: the teacher becomes a 4-step generator."""

from pathlib import Path

import common

import rtdmd_jax

TINY = Path(rtdmd_jax.__file__).parent / "assets/tiny"


def tiny(c):
  """What both tiny stages share."""
  c.model.pretrained = str(TINY)
  c.model.image_size = 64
  c.model.dtype = "float32"
  c.model.remat = "dots"  # on a CPU, less to store is also a third faster
  c.data.prompts = str(TINY / "prompts")
  c.data.held_out = str(TINY / "prompts")
  c.lora.rank = 8
  c.lora.alpha = 16.0
  c.lora.init = "rsqrt"  # what the learning rates below were chosen with
  c.lora.targets += ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
  c.rewards.clipscore = dict(weight=1.0, directory=str(TINY / "clip"))
  c.rewards.geneval = dict(weight=1.0, detector="shapes")
  c.eval.chunk = 48
  # Gradients of mean losses are as small as Adam's usual eps.
  c.generator.eps = c.fake_score.eps = 1e-12
  c.train.log_every = 5
  return c


def get_config():
  c = tiny(common.stage1())
  c.generator.learning_rate = 5e-4
  c.fake_score.learning_rate = 1e-3
  c.dmd.guidance_low = c.dmd.guidance_high = 3.0
  c.eval.teacher_guidance = 3.0
  c.batch.prompts = 32
  c.train.steps = 600
  c.train.fake_update_ratio = 3
  c.train.save_every = 150
  c.eval.every = 150
  return c
