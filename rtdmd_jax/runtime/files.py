"""Files that appear whole or not at all, readable by whom the umask says."""

import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def replace_file(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
  """Puts a file in the place of another in one step.

  Args:
    path: the file; its folder is made if need be.
    write: writes the file whose path it is given, which lies beside `path`.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".partial")
  partial.unlink(missing_ok=True)  # of a process that was killed
  partial.touch()
  mode = stat.S_IMODE(partial.stat().st_mode)
  write(partial)
  # Some writers, safetensors' among them, put a private file of their own in its place.
  if stat.S_IMODE(partial.stat().st_mode) != mode:
    partial.chmod(mode)
  partial.replace(path)


def replace_text(path: str | os.PathLike, text: str) -> None:
  """Puts a UTF-8 text in the place of a file in one step."""
  replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def save_tensors(
  path: str | os.PathLike,
  tensors: Mapping[str, np.ndarray],
  notes: Mapping[str, str] | None = None,
) -> None:
  """Writes a safetensors file in one step; the same values are the same bytes every time.

  Args:
    path: the file.
    tensors: by key; each must lie in memory in the order of its axes.
    notes: joins the header's metadata.
  """
  metadata = {"format": "pt", **(notes or {})}

  def write(partial: Path) -> None:
    save_file(dict(tensors), partial, metadata=metadata)
    _sort_metadata(partial)

  replace_file(path, write)


def _sort_metadata(file: Path) -> None:
  """Orders the metadata of a safetensors file by name: safetensors does it at random."""
  with file.open("r+b") as stream:
    length = int.from_bytes(stream.read(8), "little")
    header = json.loads(stream.read(length))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    stream.seek(8)
    stream.write(text.ljust(length))
