"""RTDMD on the shipped tiny pipeline: the quick run of the README."""

import common
from tiny_stage1 import TINY, tiny


def get_config():
  c = tiny(common.stage2())
  c.load.generator = str(TINY / "stage1/generator")
  c.load.fake_score = str(TINY / "stage1/fake_score")
  c.generator.learning_rate = 5e-4
  c.fake_score.learning_rate = 5e-4
  c.dmd.guidance_low = c.dmd.guidance_high = 3.0
  c.dmd.consistency.weight = 0.0  # as published for FLUX
  c.eval.teacher_guidance = 3.0
  c.batch.prompts = 16
  c.batch.images_per_prompt = 6
  c.batch.micro_batches = 2
  c.rewards.clipscore.backpropagate = True
  c.policy.policy_weight = 1.0
  c.policy.dmd_weight = 0.1
  c.policy.reward_weight = 0.3
  c.ema.decay = 0.0  # no average: it lags behind in so few updates (docs/evidence.md)
  c.ema.every = c.ema.applications = 1
  c.ema.warmup = False
  c.train.steps = 30
  c.train.log_every = 1
  c.train.save_every = 10
  c.eval.every = 10
  c.eval.final_images = 2
  return c
