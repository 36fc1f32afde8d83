"""Options of the rewards that name models, and where those lie on this machine."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rtdmd_jax.weights.hub import local_path

# Options of the built-in rewards that name files or directories.
PATHS = ("directory", "weights", "tokenizer", "processor", "clip", "questions")
# What each option takes of a repository, a name in `hub_files.KINDS`.
_KINDS = {
  "clipscore": {"directory": "model"},
  "pickscore": {"directory": "encoder", "processor": "processor"},
  "hpsv2": {"weights": "file", "directory": "config"},
  "aesthetic": {"weights": "file", "directory": "model"},
  "imagereward": {"weights": "file", "tokenizer": "tokenizer"},
  "hpsv3": {"directory": "hpsv3"},
  "geneval": {"directory": "encoder", "clip": "model"},
  "geneval2": {"directory": "model", "tokenizer": "tokenizer"},
}


def local_options(
  reward: str,
  options: Mapping[str, Any],
  locate: Callable[[str | os.PathLike, str], Path] = local_path,
) -> dict[str, Any]:
  """The options of a reward with a path of this machine in place of each name of a model.

  Args:
    reward: its name; options of rewards that are named by import path stay as they are.
    options: of the reward; those that name no model stay.
    locate: finds a name of some kind; see `hub.local_path`, as for what is raised.
  """
  local = dict(options)
  for key in _KINDS.get(reward, {}):
    if isinstance(local.get(key), str):
      local[key] = str(locate(local[key], option_kind(reward, key, options)))
  return local


def option_kind(reward: str, option: str, options: Mapping[str, Any]) -> str | None:
  """The kind of files that an option takes of a repository (`hub_files.KINDS`), or None."""
  if (reward, option) == ("pickscore", "directory") and options.get("processor") is None:
    return "model"
  return _KINDS.get(reward, {}).get(option)


def local_option(reward: str, key: str, value: str) -> str:
  """One option of `local_options`."""
  return local_options(reward, {key: value})[key]
