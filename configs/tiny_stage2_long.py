"""RTDMD on the shipped tiny pipeline, more updates at a lower rate than the quick run."""

import tiny_stage2


def get_config():
  c = tiny_stage2.get_config()
  c.generator.learning_rate = 2e-4
  c.policy.num_train_steps = 1
  c.policy.range_end = 0
  c.train.steps = 100
  c.train.save_every = 50
  c.eval.every = 50
  c.eval.final_images = 4
  return c
