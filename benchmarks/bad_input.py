"""Reads generated bad input and counts what becomes of it, as a table in markdown.

python -m benchmarks.bad_input --examples=400

Exits with 1 if anything but one sentence of refusal was raised; the first such case of each kind is
printed. Needs the `test` extra.
"""

import argparse
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.support.bad_inputs import SURFACES, Surface, outcome, service


def campaign(surface: Surface, examples: int, number: int) -> tuple[Counter, dict[str, str]]:
  """Counts of outcomes, and the first case with its traceback of each kind of defect."""
  counts: Counter[str] = Counter()
  defects: dict[str, str] = {}

  @seed(number)
  @settings(
    max_examples=examples,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
  )
  @given(surface.cases)
  def attempt(case):
    with tempfile.TemporaryDirectory() as folder:
      try:
        counts[outcome(surface, Path(folder), case)] += 1
      except Exception as error:
        counts["defect"] += 1
        last = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
        defects.setdefault(kind, f"{case!r:.500}\n{traceback.format_exc()[-1500:]}")

  attempt()
  return counts, defects


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--examples", type=int, default=400, help="of each kind of input")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", default="", help="kinds whose name holds this")
  options = parser.parse_args()
  print("| input | generated | refused in a sentence | harmless, accepted | anything else |")
  print("|---|---:|---:|---:|---:|")
  total: Counter[str] = Counter()
  found = {}
  with service():
    for surface in SURFACES:
      if options.only not in surface.name:
        continue
      counts, defects = campaign(surface, options.examples, options.seed)
      total += counts
      found |= {f"{surface.name}: {kind}": text for kind, text in defects.items()}
      print(_row(surface.name, counts), flush=True)
  print(_row("all", total))
  for kind, text in found.items():
    print(f"\n{kind}\n{text}")
  return 1 if found else 0


def _row(name: str, counts: Counter) -> str:
  numbers = [counts.total(), counts["refused"], counts["accepted"], counts["defect"]]
  return f"| {name} | {' | '.join(f'{n:,}' for n in numbers)} |"


if __name__ == "__main__":
  sys.exit(main())
