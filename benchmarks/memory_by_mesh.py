"""What lies on every device during stage 2 of each family: python -m benchmarks.memory_by_mesh

Bytes at rest by the sharding table (parameters, adapters with moments and moving average, text
encoders, autoencoder, rewards on the device) without the temporaries of a step, which
`python -m rtdmd_jax.aot` measures. Nothing is loaded: shapes are those of published checkpoints.
With int8 bases the transformers' kernels take a byte a weight; with offloading those of
transformers and text encoders take none.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from benchmarks import record, tables
from rtdmd_jax.aot.abstract import abstract_setup
from rtdmd_jax.config import load_config
from rtdmd_jax.runtime import sharding
from rtdmd_jax.training.stages import initial_state

CONFIGS = Path(__file__).parents[1] / "configs"
DEVICES = (1, 4, 8, 16, 64)
FAMILIES = ("sd3", "sd35", "flux1", "flux2", "flux2_9b")
BASES = ("native", "int8", "offload")
OFFLOADED = ("transformers", "text encoders")  # by model.offload


def trees(config):
  """Everything that stays on the devices, by name."""
  setup = abstract_setup(config)
  state = jax.eval_shape(lambda: initial_state(config, setup))
  frozen = setup.frozen
  return {
    "transformers": list(frozen.bases.values()),
    "training": [state, frozen.generator, frozen.fake_score],
    "text encoders": setup.pipeline.text.params,
    "rewards and autoencoder": [frozen.rewards, frozen.vae],
  }


def measure(family: str, bases: str) -> dict[str, Any]:
  """GB per device by the number of devices, and on one device by what it is."""
  storage = "int8" if bases == "int8" else "native"
  config = load_config(str(CONFIGS / f"{family}_stage2.py"), [f"model.base_storage={storage}"])
  found, row = trees(config), {"config": f"{family}_stage2", "bases": bases}
  for count in DEVICES:
    axes = (AxisType.Auto,) * 3
    mesh = AbstractMesh((1, count, 1), ("data", "fsdp", "tensor"), axis_types=axes)
    placed = {
      name: sharding.shard_on(tree, mesh, offload=bases == "offload" and name in OFFLOADED)
      for name, tree in found.items()
    }
    sizes = [local / 1e9 for *_, local in sharding.table(placed, mesh)]
    row[f"devices_{count}"] = round(sum(sizes), 3)
    if count == 1:
      named = zip(found, sizes, strict=True)
      parts = {name.replace(" ", "_"): round(size, 3) for name, size in named}
  return row | parts


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  record.add_flag(parser)
  options = parser.parse_args()
  rows = [measure(family, bases) for bases in BASES for family in FAMILIES]
  tables.report("memory_by_mesh", rows, options.save)


if __name__ == "__main__":
  main()
