"""Prompt files of the shapes set, in GenEval's format: one JSON record a line."""

import json
from pathlib import Path

from rtdmd_jax.datasets.shapes.grammar import all_records, split

TRAIN_FILE, TEST_FILE = "train_metadata.jsonl", "test_metadata.jsonl"


def write_prompt_files(directory: str | Path) -> dict[Path, int]:
  """Writes `train_metadata.jsonl` and `test_metadata.jsonl` (held-out prompts).

  Args:
    directory: where to write; created if missing, files of these names are replaced.

  Returns:
    The number of records of each file written.
  """
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  written = {}
  for name, records in zip((TRAIN_FILE, TEST_FILE), split(all_records()), strict=True):
    path = directory / name
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    written[path] = len(records)
  return written
