"""The shipped tiny pipeline's last part: goes on with images of mixed quality.

Half of them are washed out, with captions that are as true as the others', so that guidance draws
such images, too: what a reward can mend.
"""

import tiny_pretrain


def get_config():
  c = tiny_pretrain.get_config()
  c.start = "runs/clean/pipeline"
  c.phases = ("vae", "teacher")  # of the autoencoder only the decoder
  c.washed_out = 0.5
  c.vae.steps = 600
  c.vae.learning_rate = 1e-3
  c.teacher.steps = 900
  c.teacher.learning_rate = 5e-3
  return c
