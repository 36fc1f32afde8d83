"""Times every program of a training step with random weights of the published shapes.

  python -m benchmarks.programs                      # one GPU: the list below, case by case
  python -m benchmarks.programs configs/flux2_stage1.py --attention auto xla     # some of them
  python -m benchmarks.programs configs/tiny_stage1.py --devices 1 2 4 8 --images=32

No checkpoint is needed. Each case runs in a process of its own: a config, an attention kernel, a
number of devices (of a CPU: simulated ones). A row is one program, printed when it is known:
seconds of its first call, mean seconds of the next ones, rate, the part of the devices' peak (where
it is known), and the largest memory that the process has had on a device until then. Rollouts stop
at random, so take --rounds from 10 up to compare two rows closely; rates take the mean length of a
rollout.
"""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import record, tables
from rtdmd_jax.aot.abstract import abstract_batch, abstract_setup
from rtdmd_jax.config import load_config
from rtdmd_jax.runtime.flops import count_flops
from rtdmd_jax.runtime.sharding import current, make_mesh, shardings
from rtdmd_jax.runtime.throughput import loop_turns, peak_tflops
from rtdmd_jax.training.programs import compile_programs
from rtdmd_jax.training.stages import initial_state, step_programs

ROOT = Path(__file__).parents[1]

# Config and attention kernel, for one GPU of 80 GB or more.
GPU_CASES = (
  ("sd35_stage1", "auto"),
  ("sd35_stage1", "xla"),
  ("flux2_stage1", "auto"),
  ("flux2_stage1", "xla"),
  ("sd35_stage2", "auto"),
  ("flux2_stage2", "auto"),
)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("configs", nargs="*", type=Path, help="the GPU's list by default")
  parser.add_argument("--attention", nargs="+", default=["auto"], help="kernels to compare")
  parser.add_argument("--devices", nargs="+", type=int, default=[0], help="0: all there are")
  parser.add_argument("--images", type=int, default=8, help="of a batch")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the configs")
  parser.add_argument("--case", action="store_true", help=argparse.SUPPRESS)
  record.add_flag(parser)
  options = parser.parse_args()
  if options.case:
    run_case(options)
    return 0
  cases = [(c, a) for c in options.configs for a in options.attention]
  cases = cases or [(ROOT / f"configs/{name}.py", kernel) for name, kernel in GPU_CASES]
  rows, failed = [], 0
  for config, attention in cases:
    for devices in options.devices:
      command = [sys.executable, "-m", "benchmarks.programs", str(config), "--case"]
      command += [f"--attention={attention}"]
      command += [f"--devices={devices}", f"--images={options.images}"]
      command += [f"--rounds={options.rounds}", "--set", *options.set]
      with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as case:
        for line in case.stdout:
          print(line, end="", file=sys.stderr, flush=True)
          rows += [json.loads(line)] if line.startswith("{") else []
      failed += case.returncode != 0
  tables.report("programs", rows, options.save, ("config", "attention", "devices", "program"))
  return int(failed > 0)


def run_case(options: argparse.Namespace) -> None:
  """Prints the rows of one config, as lines of JSON."""
  (path,), (attention,), (devices,) = options.configs, options.attention, options.devices
  if devices:
    jax.config.update("jax_num_cpu_devices", devices)
  config = load_config(str(path), [f"model.attention={attention}", *options.set])
  images_per_prompt = 4 if config.stage == "stage2" and options.images % 4 == 0 else 1
  config.batch.update(
    prompts=options.images // images_per_prompt,
    images_per_prompt=images_per_prompt,
    micro_batches=1,
  )
  setup = abstract_setup(config)
  mesh = make_mesh(**config.mesh, devices=jax.devices()[: devices or None])
  with jax.set_mesh(mesh):
    for row in measure(config, setup, options.rounds):
      numbers = {key: row[key] for key in ("first", "seconds", "tflops", "mfu", "peak_gb")}
      names = {"config": path.stem, "attention": attention, "devices": mesh.size}
      print(json.dumps(names | {"program": row["name"]} | numbers), flush=True)


def measure(config: Any, setup: Any, rounds: int) -> Iterator[dict[str, Any]]:
  """Calls each program of a step `rounds` times after a first one; a dictionary for each."""
  frozen, batch = random_like(setup.frozen), random_batch(config, setup)
  setup = dataclasses.replace(setup, frozen=frozen)
  state = jax.jit(lambda: initial_state(config, setup))()
  programs = step_programs(config, setup)
  compiled = compile_programs(programs, config.seed)
  mesh, most = current(), peak_tflops()
  most = most and most * (mesh.size if mesh else 1) / jax.device_count()
  known = {"frozen": frozen, "batch": batch}
  for program in programs:
    name, run, spent = program.name, compiled[program.name], []
    turns, _ = loop_turns(name, len(config.dmd.timesteps))
    traced = run.trace(*program.arguments(known | {"state": state}))
    row = {"name": name, "spent": spent, "tflop": count_flops(traced.jaxpr, turns) / 1e12}
    for _ in range(rounds + 1):
      args = program.arguments(known | {"state": state})
      began = time.perf_counter()
      out = jax.block_until_ready(run(*args))
      spent.append(time.perf_counter() - began)
      if name == "rollout":
        scores = {key: jnp.zeros(len(batch.sample_index)) for key in config.rewards}
        known |= {"samples": out, "rewards": scores | dict(out.rewards)}
      else:
        state = out[0] if isinstance(out, tuple) else out
      state = state.replace(step=state.step + 1)  # other random numbers, and another random stop
    yield _summary(row | {"peak_gb": _peak()}, most)


def _summary(row: dict[str, Any], most: float | None) -> dict[str, Any]:
  first, *later = row["spent"]
  seconds = sum(later) / len(later)
  rate = row["tflop"] / seconds
  mfu = rate / most if most else None
  return row | {"first": first, "seconds": seconds, "tflops": rate, "mfu": mfu}


def _peak() -> float | None:
  """GB that this process has had on the first device at most, if the platform tells."""
  found = jax.local_devices()[0].memory_stats() or {}
  return found["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in found else None


def random_like(shapes: Any) -> Any:
  """Small numbers for every leaf of a tree of shapes, placed as a run would, by one program."""
  leaves, tree = jax.tree.flatten(shapes)
  mesh = current()
  places = jax.tree.leaves(shardings(shapes, mesh)) if mesh else None
  return tree.unflatten(jax.jit(lambda: [_fill(s) for s in leaves], out_shardings=places)())


def _fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
  """Numbers without a pattern that a kernel could profit from, and quick to compile."""
  index = jax.lax.iota(jnp.uint32, max(math.prod(leaf.shape), 1)).reshape(leaf.shape or (1,))
  mixed = (index * jnp.uint32(2654435761)) >> 16  # Knuth's multiplicative hash, 16 bits
  if jnp.issubdtype(leaf.dtype, jnp.floating):
    made = 0.02 * (mixed.astype(jnp.float32) / 2**15 - 1)
  else:
    made = mixed % 100
  return made.astype(leaf.dtype).reshape(leaf.shape)


def random_batch(config: Any, setup: Any) -> Any:
  """A batch of random encodings; consecutive samples share a prompt."""
  shapes = abstract_batch(config, setup)
  count = shapes.sample_index.shape[0]
  filled = jax.tree.map(_fill, shapes)
  return filled.replace(
    prompt_index=jnp.arange(count, dtype=jnp.int32) // config.batch.images_per_prompt,
    sample_index=jnp.arange(count, dtype=jnp.uint32),
  )


if __name__ == "__main__":
  sys.exit(main())
