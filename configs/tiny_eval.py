"""Teacher, cold start and base at few steps of the shipped tiny pipeline, side by side."""

from ml_collections import config_dict
from tiny_stage1 import TINY


def get_config():
  c = config_dict.ConfigDict()
  c.pipeline = str(TINY)
  c.dtype = "float32"
  c.height = c.width = 64
  c.seed = 42
  c.batch = 48
  c.preview = 12  # prompts shown in the report
  c.limit = 0  # prompts of each set; 0: all
  c.prompts = config_dict.ConfigDict({"shapes": str(TINY / "prompts")})
  few = dict(few_step=True, steps=4, guidance=1.0)
  c.systems = config_dict.ConfigDict()
  c.systems.teacher = dict(few_step=False, steps=50, guidance=3.0, loras=())
  c.systems.base = dict(**few, loras=())
  c.systems.cold_start = dict(
    **few, loras=({"path": str(TINY / "stage1/generator"), "scale": 1.0},)
  )
  c.rewards = config_dict.ConfigDict(allow_dotted_keys=True)
  c.rewards.clipscore = dict(prompts="shapes", directory=str(TINY / "clip"))
  c.rewards.geneval = dict(prompts="shapes", detector="shapes")
  return c
