"""Sorts split rows on simulated devices; a script, because the devices are set at start.

Prints the micro-batches, and which collectives the compiled program has.
"""

import json
import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rtdmd_jax.runtime import sharding
from rtdmd_jax.training.micro_batching import sorted_parts

jax.config.update("jax_num_cpu_devices", 4)

with jax.set_mesh(sharding.make_mesh(2, 2, 1)):
  split = jax.sharding.NamedSharding(sharding.current(), PartitionSpec(sharding.BATCH_AXES))
  last = jax.device_put(jnp.array([1, 0, 1, 1, 1, 0, 1, 0], bool), split)
  rows = jax.device_put(jnp.arange(8), split)
  pixels = jax.device_put(jnp.zeros((8, 4, 4, 3)), split)
  program = jax.jit(lambda last, rows: sorted_parts(last, 2, rows)).lower(last, (rows, pixels))
  program = program.compile()
  parts = program(last, (rows, pixels))[0].tolist()
found = re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", program.as_text())
print(json.dumps({"parts": parts, "collectives": sorted(set(found))}))
