"""Encodes prompts with the tiny pipeline on a mesh; a script, because devices are set at start.

`python tests/support/encoded_run.py DEVICES OUT DATA,FSDP,TENSOR ...`; 1,1,1 is one
device without a mesh.
DEVICES are those of a process; the environment may join several, of which 0 writes.
"""

import os
import sys

from tests.support.xla_flags import xla_flags

os.environ["XLA_FLAGS"] = xla_flags(sys.argv[1])


import jax
import numpy as np

from rtdmd_jax.pipeline import Pipeline
from rtdmd_jax.pipeline.prompt_cache import PromptCache, encoding_chunk
from rtdmd_jax.rewards import device_rewards
from rtdmd_jax.runtime import distributed, multihost, sharding
from rtdmd_jax.training import setup
from tests.support.paths import TINY
from tests.support.sharded_run import on

PROMPTS = [f"a photo of {n} red circles and a blue square" for n in range(16)]


def run():
  """The encodings of all prompts, and what the text encoders compute on a device."""
  pipeline = Pipeline.from_pretrained(TINY)
  models = {"clipscore": device_rewards.load("clipscore", {"directory": TINY / "clip"})}
  chunk = encoding_chunk(len(PROMPTS), sharding.batch_parts())
  cache = PromptCache(setup._encoder(pipeline, models), chunk=chunk)
  encoded = cache(PROMPTS)
  ids = sharding.split_or_replicate(pipeline.text.tokenize(PROMPTS))
  compiled = jax.jit(pipeline.text.encode).lower(pipeline.text.params, ids).compile()
  split = {
    a.sharding.shard_shape(a.shape) != a.shape for a in jax.tree.leaves(pipeline.text.params)
  }
  return {
    "tokens": encoded["conditioning"].tokens,
    "pooled": encoded["conditioning"].pooled,
    "reward": encoded["reward_text"]["clipscore"],
    "flops": compiled.cost_analysis()["flops"],
    "split": True in split,
  }


if __name__ == "__main__":
  distributed.initialize()
  for mesh in sys.argv[3:]:
    with on(mesh):
      out = run()
    if multihost.is_main():
      np.savez(f"{sys.argv[2]}/{mesh}.npz", **out)
