"""What lies on every device during stage 2 of each family: python -m benchmarks.memory_by_mesh

Bytes at rest by the sharding table (parameters, adapters with moments and moving average, text
encoders, autoencoder, rewards on the device) without the temporaries of a step, which
`python -m rtdmd_jax.aot` measures. Nothing is loaded: shapes are those of published checkpoints.
With --base_storage=int8 the transformers' kernels take a byte a weight, with --offload those of
transformers and text encoders none.
"""

import argparse
from pathlib import Path

import jax
from jax.sharding import AbstractMesh, AxisType

from rtdmd_jax.aot.abstract import abstract_setup
from rtdmd_jax.config import load_config
from rtdmd_jax.runtime import sharding
from rtdmd_jax.training.stages import initial_state
from rtdmd_jax.weights.int8 import STORAGES

CONFIGS = Path(__file__).parents[1] / "configs"
DEVICES = (1, 4, 8, 16, 64)
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


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--base_storage", choices=STORAGES, default="native")
  parser.add_argument("--offload", action="store_true")
  options = parser.parse_args()
  overrides = [f"model.base_storage={options.base_storage}"]
  sizes = " | ".join(f"{n} device{'s' * (n > 1)}" for n in DEVICES)
  print(f"| | {sizes} | on one: transformers, training, text encoders, rewards and autoencoder |")
  print("|---" * (len(DEVICES) + 2) + "|")
  for family in ("sd3", "sd35", "flux1", "flux2", "flux2_9b"):
    found = trees(load_config(str(CONFIGS / f"{family}_stage2.py"), overrides))
    cells, parts = [], []
    for count in DEVICES:
      axes = (AxisType.Auto,) * 3
      mesh = AbstractMesh((1, count, 1), ("data", "fsdp", "tensor"), axis_types=axes)
      placed = {
        name: sharding.shard_on(tree, mesh, offload=options.offload and name in OFFLOADED)
        for name, tree in found.items()
      }
      sizes = [local / 1e9 for *_, local in sharding.table(placed, mesh)]
      cells.append(f"{sum(sizes):.1f}")
      parts = parts or [f"{size:.1f}" for size in sizes]
    print(f"| `{family}` | " + " | ".join(cells) + f" | {', '.join(parts)} |", flush=True)


if __name__ == "__main__":
  main()
