"""Options of the rewards that name models, and where those lie on this machine."""

from collections.abc import Mapping
from typing import Any

from rtdmd_jax.hub import local_path

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
  reward: str, options: Mapping[str, Any], *, download: bool = True
) -> dict[str, Any]:
  """The options of a reward with a path of this machine in place of each name of a model.

  Args:
    reward: its name; options of rewards that are named by import path stay as they are.
    options: of the reward; those that name no model stay.
    download: see `hub.local_path`, as for what is raised.
  """
  found = dict(options)
  for key, kind in _KINDS.get(reward, {}).items():
    if isinstance(found.get(key), str):
      whole = reward == "pickscore" and key == "directory" and found.get("processor") is None
      found[key] = str(local_path(found[key], "model" if whole else kind, download=download))
  return found


def local_option(reward: str, key: str, value: str) -> str:
  """One option of `local_options`."""
  return local_options(reward, {key: value})[key]
