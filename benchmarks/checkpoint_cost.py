"""What a checkpoint costs training: blocks of steps with and without a save, in turns.

python -m benchmarks.checkpoint_cost --config=configs/tiny_stage1.py --blocks=10 --steps=9

Prints a row of a markdown table: how long the loop stands still in `save`, by how much a block that
begins with a save takes longer than the one before it (the copy to the host and the writing
in the background included; medians over the blocks), and what that is of `train.save_every` steps.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks import record, tables
from rtdmd_jax.config import load_config
from rtdmd_jax.runtime.checkpoint import Checkpoints
from rtdmd_jax.runtime.sharding import make_mesh
from rtdmd_jax.training.setup import build
from rtdmd_jax.training.stages import initial_state, make_step, step_batch


def measure(config, blocks: int, steps: int, folder: Path) -> dict[str, Any]:
  setup = build(config)
  state = jax.jit(lambda: initial_state(config, setup))()
  step_fn = make_step(config, setup)
  batch, prompts = step_batch(config, setup, 0)
  number, still, plain, saving = 0, [], [], []
  with Checkpoints(folder, keep=2) as saved:
    for block in range(2 * blocks + 1):
      begin = time.perf_counter()
      if block and block % 2 == 0:
        saved.save(number, state, {})
        still.append(time.perf_counter() - begin)
      for _ in range(steps):
        state, _ = step_fn(state, batch, prompts, number)
        number += 1
      jax.block_until_ready(state)
      if block:  # the first one compiles
        (plain if block % 2 else saving).append(time.perf_counter() - begin)
  size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
  step = statistics.median(plain) / steps
  extra = statistics.median(b - a for a, b in zip(plain, saving, strict=True))
  every = config.train.save_every
  return {
    "stage": config.stage, "state_mb": size, "step_seconds": step,
    "still_seconds": statistics.median(still), "longer_seconds": extra, "save_every": every,
    "cost": extra / (every * step),
  }  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--config", required=True)
  parser.add_argument("--blocks", type=int, default=10, help="with a save, and as many without")
  parser.add_argument("--steps", type=int, default=9, help="steps a block")
  record.add_flag(parser)
  options = parser.parse_args()
  config = load_config(options.config)
  with jax.set_mesh(make_mesh(**config.mesh)), tempfile.TemporaryDirectory() as folder:
    row = measure(config, options.blocks, options.steps, Path(folder))
  tables.report("checkpoint_cost", [row], options.save, ("stage",))


if __name__ == "__main__":
  main()
