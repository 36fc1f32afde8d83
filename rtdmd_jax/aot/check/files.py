"""Files and folders of a run: its workdir, and what it reads besides networks and rewards."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from rtdmd_jax.aot.check.report import Report
from rtdmd_jax.datasets.prompts import Prompt, load_prompts
from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.held_out_sets import held_out_path, reward_sections
from rtdmd_jax.training.resume import FIXED, check_resume, read_stored_config
from rtdmd_jax.weights.hub import local_path


def existing(key: str, value: str | Path, kind: str, fix: str = "") -> Path:
  """The path of a model that a configuration names.

  Args:
    key: of the configuration.
    value: of the key.
    kind: of the model, a name in `hub_files.KINDS`; nothing is downloaded.
    fix: what to do about a missing one.

  Raises:
    UserError: it does not exist; for a repository of the hub with the command that fetches it.
  """
  try:
    path = local_path(value, kind, download=False)
  except UserError as error:
    raise UserError(f"{key}: {error}") from error
  return there(key, value, path, fix)


def there(key: str, value: str | Path, path: Path, fix: str = "") -> Path:
  """`path`, which the `value` of a key stands for, if it exists.

  Raises:
    UserError: it does not; see `existing` for the sentence's parts.
  """
  if not path.exists():
    raise UserError(f"{key} is {value}, which does not exist{fix and '; '}{fix}.")
  return path


def check_workdir(config: Any, workdir: Path, allow_config_change: bool) -> list[str]:
  """Lines that say whether a run in `workdir` is new, or goes on from where.

  Raises:
    UserError: it cannot be written to, or holds another run.
  """
  there = next(p for p in (workdir, *workdir.absolute().parents) if p.exists())
  if not there.is_dir() or not os.access(there, os.W_OK):
    raise UserError(f"--workdir is {workdir}, but {there} is not a directory that can be written.")
  saved = [int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit()]
  if not saved:
    return [f"workdir: {workdir}, a new run"]
  name, settings = f"{workdir / 'checkpoints'}/{max(saved)}", config.to_json_best_effort()
  stored = read_stored_config(workdir / "config.json")
  changed = check_resume(name, stored, json.loads(settings), FIXED, allow=allow_config_change)
  return [
    f"workdir: {workdir}, goes on after step {max(saved)}",
    *(f"  changed: {c}" for c in changed),
  ]


class Prompts(NamedTuple):
  """The prompts of a run; a set that could not be read is empty.

  Attributes:
    train: to train on.
    held_out: what each reward is evaluated on, by its section ("rewards.clipscore").
  """

  train: list[Prompt]
  held_out: dict[str, list[Prompt]]


def read_prompts(report: Report, config: Any) -> Prompts:
  """Reads every prompt set of a run; adds a line about them."""
  read: dict[tuple[str, str], list[Prompt]] = {}

  def load(key: str, value: str, split: str) -> list[Prompt]:
    if (split, value) not in read:
      read[split, value] = report.attempt(_load, key, value, split) or []
    return read[split, value]

  training = load("data.prompts", config.data.prompts, "train")
  common = load("data.held_out", config.data.held_out, "test")
  held_out = {}
  for section, name, options in reward_sections(config):
    key = f"{section}.{name}"
    path = report.attempt(held_out_path, config, section, name, options)
    held_out[key] = [] if path is None else load(f"{key}.held_out", path, "test")
  if training and common:
    report.lines.append(
      f"prompts: {len(training):,} to train on ({config.data.prompts}), {len(common):,} held out"
      f" ({config.data.held_out})"
    )
  return Prompts(training, held_out)


def _load(key: str, value: str, split: str) -> list[Prompt]:
  if not value:
    raise UserError(f"{key} is empty; name a file or folder of prompts.")
  try:
    return load_prompts(value, split=split, metadata=True)
  except UserError as error:
    raise UserError(f"{key}: {error}") from error
