"""RTDMD on the shipped tiny pipeline, four times as long as the quick run."""

import tiny_stage2


def get_config():
  c = tiny_stage2.get_config()
  c.generator.learning_rate = 2e-4
  c.ema.decay = 0.99
  c.policy.num_train_steps = 1
  c.policy.range_end = 0
  c.policy.reward_weight = 0.3
  c.train.steps = 200
  c.train.save_every = 100
  c.eval.every = 50
  c.eval.final_images = 4
  return c
