"""Places and config files of the models that a configuration names."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rtdmd_jax.weights.directory import read_config
from rtdmd_jax.weights.hub import local_path

# Maps a JSON file's path inside a model's directory to its contents.
Read = Callable[[str], dict[str, Any]]


class Source(NamedTuple):
  """A way to find models, and to read config files of theirs.

  Attributes:
    locate: maps a name and its kind in `hub_files.KINDS` to a path.
    read: maps such a path and a JSON file inside to its contents.
  """

  locate: Callable[[str | os.PathLike, str], Path]
  read: Callable[[str | os.PathLike, str], dict[str, Any]]


def read_file(directory: str | os.PathLike, file: str) -> dict[str, Any]:
  """The contents of a JSON file of a model's directory; see `read_config`."""
  path = Path(directory, file)
  return read_config(path.parent, path.name)


# What a run takes: models of this machine, downloaded if need be.
MACHINE = Source(local_path, read_file)
