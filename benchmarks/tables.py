"""Writes the tables of measured numbers into the pages.

  python -m benchmarks.tables            # rewrites what stands between the markers
  python -m benchmarks.tables --check    # exits with 1 if a page differs

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. Its numbers come from a file in
benchmarks/results/, and its columns from benchmarks/columns.py. Rows that are grouped or compared
come from benchmarks/selections.py.
"""

import argparse
import re
import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.columns import TABLES, Table

ROOT = Path(__file__).parents[1]
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_NUMBER = re.compile(r"[-+]?[\d.,]+(?:e-?\d+)?%?(?: ± [\d.]+)?(?: s)?|")


class _Cells(string.Formatter):
  """`str.format`, and `{x:digits}` for three digits at least."""

  def format_field(self, value: Any, spec: str) -> str:
    if spec == "digits":
      return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return super().format_field(value, spec)


def pages() -> list[Path]:
  """README.md and the pages of docs/."""
  return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(table: Table, rows: list[dict[str, Any]] | None = None) -> str:
  """A table in Markdown.

  Args:
    table: its columns.
    rows: of a result; those of the table's file by default.
  """
  if rows is None:
    rows = record.read(table.result)
  columns = table.columns.values()
  lines = [[_cell(template, row) for template in columns] for row in table.rows(rows)]
  aligned = ["---:" if all(map(_NUMBER.fullmatch, c)) else "---" for c in zip(*lines, strict=True)]
  titles = [title.strip() for title in table.columns]  # a space tells two of a name apart
  written = [titles, aligned or ["---"] * len(table.columns), *lines]
  return "\n".join(f"| {' | '.join(cells)} |" for cells in written)


def report(name: str, rows: list[dict[str, Any]], save: bool, keys: Sequence[str] = ()) -> None:
  """Prints a benchmark's rows as the table of its name, and keeps them if told so."""
  print(render(TABLES[name], rows), flush=True)
  if save:
    record.write(TABLES[name].result, rows, keys)


def _cell(template: str, row: dict[str, Any]) -> str:
  """The template with a row's values; empty where the row lacks one of them."""
  formatter = _Cells()
  names = [re.match(r"\w+", name)[0] for _, name, *_ in formatter.parse(template) if name]
  if any(row.get(name) is None for name in names):
    return ""
  return formatter.format(template, **row)


def names(text: str) -> list[str]:
  """The tables of a page."""
  return [match[2] for match in _MARKED.finditer(text)]


def rewritten(text: str) -> str:
  """A page with the tables of today's results."""

  def table(match: re.Match) -> str:
    if match[2] not in TABLES:
      raise KeyError(f"benchmarks/columns.py has no table {match[2]!r}")
    return f"{match[1]}\n{render(TABLES[match[2]])}\n\n{match[3]}"

  return _MARKED.sub(table, text)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page differs")
  options = parser.parse_args()
  different = [page for page in pages() if rewritten(page.read_text()) != page.read_text()]
  for page in different:
    if not options.check:
      page.write_text(rewritten(page.read_text()))
    print(f"{page.relative_to(ROOT)}: {'differs' if options.check else 'written'}")
  return int(options.check and bool(different))


if __name__ == "__main__":
  sys.exit(main())
