"""Where the time of stage 1's two updates goes on this machine's CPU, by kind of operation.

taskset -c 0 python -m benchmarks.step_profile

The updates are those of benchmarks/steps.py. jax's profiler times every operation of one run, and
the compiled program says which of them hold matrix products. Needs the `parity` extra.
"""

import gzip
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import jax

from benchmarks import steps
from rtdmd_jax.aot.hlo import parse

PRODUCT, MOVE, REST = "matrix products, with what is fused to them", "copies", "everything else"
BETWEEN = "between operations"
_CONTAINERS = ("while", "conditional", "call")
_MOVES = re.compile(r"copy|transpose|broadcast|slice|concatenate|pad|bitcast|convert")


def main() -> None:
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_disable_most_optimizations", False)
  case = steps.make_case(steps.SIZES, steps.BATCH, steps.TEXT_LENGTH)
  ceiling = steps.matmul_ceiling()
  print(f"jax {jax.__version__}, large product {ceiling / 1e9:.1f} GFLOP/s")
  print(
    "| update | kind | ms | share | GFLOP/s | of the large product |\n|---|---|---|---|---|---|"
  )
  for name in steps.UPDATES:
    run = case.ours[name]
    _, program, args = run.args
    kinds = kinds_of(program.lower(*args).compile().as_text())
    found = by_kind(profile(run), kinds)
    total = sum(found.values())
    for kind, seconds in found.items():
      rate = case.flops[name] / seconds
      speed = f"{rate / 1e9:.1f} | {rate / ceiling:.0%}" if kind == PRODUCT else " | "
      print(f"| `{name}` | {kind} | {1e3 * seconds:.0f} | {seconds / total:.0%} | {speed} |")


def kinds_of(text: str) -> dict[str, str]:
  """The kind of every instruction of a compiled program, by name."""
  computations, _ = parse(text)
  products = {
    name
    for name, computation in computations.items()
    if any(i.opcode in ("dot", "convolution") for i in computation.instructions.values())
  }
  kinds = {}
  for computation in computations.values():
    for name, ins in computation.instructions.items():
      if ins.opcode in _CONTAINERS:  # their time is that of what they hold
        continue
      called = re.search(r"calls=%?([\w.\-]+)", ins.text)
      if ins.opcode in ("dot", "convolution") or (called and called[1] in products):
        kinds[name] = PRODUCT
      else:
        kinds[name] = MOVE if _MOVES.match(name.removeprefix("wrapped_")) else REST
  return kinds


def profile(run: Callable) -> list[dict]:
  """The profiler's events of one call after two others; durations in microseconds."""
  run(), run()
  with tempfile.TemporaryDirectory() as directory:
    with jax.profiler.trace(directory):
      run()
    (file,) = Path(directory).rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
  return [event for event in events if event.get("ph") == "X"]


def by_kind(events: list[dict], kinds: dict[str, str]) -> dict[str, float]:
  """Seconds of each kind of operation, and what of the program's run is none of them."""
  found = defaultdict(float)
  for event in events:
    if event["name"] in kinds:
      found[kinds[event["name"]]] += event["dur"] / 1e6
  whole = max(e["dur"] for e in events if e["name"].startswith("ThunkExecutor")) / 1e6
  return {
    PRODUCT: found[PRODUCT],
    MOVE: found[MOVE],
    REST: found[REST],
    BETWEEN: whole - sum(found.values()),
  }


if __name__ == "__main__":
  main()
