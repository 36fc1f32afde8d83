"""Reads generated bad input and counts what becomes of it, as a table.

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

from benchmarks import record, tables
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
  record.add_flag(parser)
  options = parser.parse_args()
  total: Counter[str] = Counter()
  rows, found = [], {}
  with service():
    for surface in SURFACES:
      if options.only not in surface.name:
        continue
      counts, defects = campaign(surface, options.examples, options.seed)
      total += counts
      found |= {f"{surface.name}: {kind}": text for kind, text in defects.items()}
      rows.append(_row(surface.name, counts))
      print(rows[-1], file=sys.stderr, flush=True)
  tables.report("bad_input", [*rows, _row("all", total)], options.save)
  for kind, text in found.items():
    print(f"\n{kind}\n{text}")
  return 1 if found else 0


def _row(name: str, counts: Counter) -> dict[str, str | int]:
  return {
    "input": name, "generated": counts.total(), "refused": counts["refused"],
    "accepted": counts["accepted"], "defects": counts["defect"],
  }  # fmt: skip


if __name__ == "__main__":
  sys.exit(main())
