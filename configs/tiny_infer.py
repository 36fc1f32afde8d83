"""Images of the shipped tiny pipeline's 4-step generator."""

from ml_collections import config_dict
from tiny_stage1 import TINY


def get_config():
  c = config_dict.ConfigDict()
  c.pipeline = str(TINY)  # a diffusers directory
  c.dtype = "float32"
  c.height = 64
  c.width = 64
  c.few_step = True  # False: Euler steps, for the base with guidance
  c.steps = 4
  c.eta = 0.9  # stochasticity of the few steps
  c.guidance = 1.0
  c.seed = 42
  c.loras = ({"path": str(TINY / "stage1/generator"), "scale": 1.0},)
  c.batch = 8
  c.out = "runs/tiny_infer"
  return c
