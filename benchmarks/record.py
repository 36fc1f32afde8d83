"""Results of benchmarks: one JSON file per table, which says how it was made.

The fields are described in benchmarks/results/README.md.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FIELDS = ("machine", "commit", "date", "command", "rows")


def read(name: str) -> list[dict[str, Any]]:
  """The rows of a result; none where it was never measured."""
  path = RESULTS / f"{name}.json"
  return json.loads(path.read_text())["rows"] if path.exists() else []


def add_flag(parser: argparse.ArgumentParser) -> None:
  """Adds `--save`."""
  parser.add_argument("--save", action="store_true", help="keep the rows in benchmarks/results/")


def write(name: str, rows: list[dict[str, Any]], keys: Sequence[str] = ()) -> None:
  """Writes a result, with the machine, commit, date and command of this process.

  Args:
    name: of the file in benchmarks/results/, without its ending.
    rows: a dictionary of plain values per row.
    keys: fields that name a row. Stored rows of other names stay, and keep their provenance in
      fields of their own. Without keys all stored rows go.
  """
  date = datetime.now(UTC).strftime("%Y-%m-%d")
  made = {"machine": machine(), "commit": commit(), "date": date, "command": command_line()}
  path = RESULTS / f"{name}.json"
  if keys and path.exists():
    name_of = lambda row: [row.get(key) for key in keys]  # noqa: E731
    stored, new = json.loads(path.read_text()), [name_of(row) for row in rows]
    other = {key: stored[key] for key in made if stored[key] != made[key]}
    rows = [*(other | row for row in stored["rows"] if name_of(row) not in new), *rows]
  path.write_text(text_of(made | {"rows": rows}))


def text_of(result: dict[str, Any]) -> str:
  """The text of a results file: one line per list of plain values, and per plain row."""
  text = json.dumps(result, indent=1, ensure_ascii=False)
  one_line = lambda match: re.sub(r"\s+", " ", match[0])  # noqa: E731
  text = re.sub(r"\[[^][{}\"]*\]", one_line, text)
  return re.sub(r"\{[^{}]*\}", one_line, text) + "\n"


def command_line() -> str:
  """The command that started this process, as `python -m`."""
  spec = getattr(sys.modules["__main__"], "__spec__", None)
  name = spec.name.removesuffix(".__main__") if spec else sys.argv[0]
  return " ".join(["python -m", name, *sys.argv[1:]])


def commit() -> str:
  """The checked-out commit, with `-dirty` behind it if files differ from it."""
  call = ["git", "describe", "--always", "--dirty", "--abbrev=8", "--exclude=*"]
  try:
    done = subprocess.run(call, cwd=RESULTS.parent, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
  return done.stdout.strip()


def machine() -> str:
  """The processor of this machine and the number of cores that this process may use."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  name, wide = platform.processor() or platform.machine(), ""
  try:
    found = Path("/proc/cpuinfo").read_text()
  except OSError:
    found = ""
  if model := re.search(r"model name\s*: (.*)", found):
    name, wide = model[1], " with AVX-512" if "avx512f" in found else " without AVX-512"
  return f"{cores} cores, {name}{wide}"
