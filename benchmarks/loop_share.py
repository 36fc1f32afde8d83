"""How much of a training loop passes outside of its compiled programs.

  python -m benchmarks.loop_share configs/tiny_stage1.py configs/tiny_stage2.py --steps=12

Runs the training loop as it is, without evaluations, previews and saves, and notes when each
program is called and when its result is there. The share is what no program covers of the time
from the beginning of the third step to the end of the last program. The longest gaps are listed by
the programs around them; rewards on the host lie in one, as far as no program runs meanwhile.
"""

import argparse
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import record, tables
from rtdmd_jax import train
from rtdmd_jax.config import load_config
from rtdmd_jax.runtime.throughput import Meter
from rtdmd_jax.training.state import TrainState

NEVER = 10**9
WARM = 2  # steps that compile


class Span(NamedTuple):
  """One run of a program, in seconds."""

  name: str
  start: float
  end: float


class Recorder(Meter):
  """Notes the spans of all programs; takes the place of the loop's own meter."""

  spans: list[Span] = []

  def watch(self, programs: Mapping[str, Callable]) -> dict[str, Callable]:
    """The same programs, noted."""
    return {name: _noted(name, program) for name, program in super().watch(programs).items()}


def _noted(name: str, program: Callable) -> Callable:
  def run(*args: Any) -> Any:
    start = time.perf_counter()
    out = program(*args)
    # The state is given to the next program; metrics and samples stay.
    kept = out[1] if isinstance(out, tuple) and isinstance(out[0], TrainState) else out
    if name != "finish":
      threading.Thread(target=_end, args=(name, start, kept)).start()
    return out

  return run


def _end(name: str, start: float, out: Any) -> None:
  jax.block_until_ready(out)
  Recorder.spans.append(Span(name, start, time.perf_counter()))


def gaps(spans: list[Span]) -> tuple[float, dict[str, float]]:
  """Seconds from the first start to the last end, and those without a program by its neighbours."""
  spans = sorted(spans, key=lambda s: s.start)
  found: dict[str, float] = defaultdict(float)
  last = spans[0]
  for span in spans[1:]:
    if span.start > last.end:
      found[f"{last.name} to {span.name}"] += span.start - last.end
    last = max(last, span, key=lambda s: s.end)
  return last.end - spans[0].start, dict(found)


def spans_of(path: Path, steps: int, overrides: list[str]) -> list[Span]:
  """Spans of the steps after the first `WARM` ones."""
  config = load_config(str(path), overrides)
  config.train.update(steps=steps, save_every=NEVER)
  config.eval.update(every=NEVER, prompts=2, final_prompts=2, preview=2, teacher_steps=2)
  Recorder.spans, train.Meter = [], Recorder
  with tempfile.TemporaryDirectory() as workdir:
    train.train(config, Path(workdir))
  spans = sorted(Recorder.spans, key=lambda s: s.start)
  first = spans[0].name  # every step begins with it
  starts = [i for i, span in enumerate(spans) if span.name == first]
  return spans[starts[WARM] :]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("configs", nargs="+", type=Path)
  parser.add_argument("--steps", type=int, default=12)
  parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the configs")
  record.add_flag(parser)
  options = parser.parse_args()
  rows = []
  for path in options.configs:
    total, found = gaps(spans_of(path, options.steps, options.set))
    longest = sorted(found.items(), key=lambda item: -item[1])[:3]
    parts = [{"between": name, "share": seconds / total} for name, seconds in longest]
    share = sum(found.values()) / total
    rows.append({"config": path.stem, "seconds": total, "share": share, "gaps": parts})
  tables.report("loop_share", rows, options.save, ("config",))


if __name__ == "__main__":
  main()
