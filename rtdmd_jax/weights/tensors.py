"""Tensors of a checkpoint, in a file or at hand, read a few rows at a time."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from rtdmd_jax.errors import UserError

# A tensor is read in rows of about this size, so that little lies beside the leaf it goes to.
_BLOCK_BYTES = 16 << 20


class Tensor(NamedTuple):
  """The place of a tensor in a file."""

  file: Path
  stream: BinaryIO
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
    """Runs of the first axis as (first index, array); a scalar is one run.

    The file is read, not mapped: mapped pages would count as memory of the process.
    """
    rows = self.shape[0] if self.shape else 1
    row_shape = self.shape[1:]
    row_bytes = int(np.prod(row_shape, dtype=np.int64)) * self.dtype.itemsize
    step = max(1, _BLOCK_BYTES // max(1, row_bytes))
    buffer = np.empty(min(step, rows) * row_bytes, np.uint8)
    self.stream.seek(self.offset)
    for start in range(0, rows, step):
      count = min(step, rows - start)
      part = buffer[: count * row_bytes]
      if self.stream.readinto(part) != len(part):
        raise UserError(f"{self.file} ended while it was read; is it still being written?")
      yield start, part.view(self.dtype).reshape((count, *row_shape) if self.shape else ())

  def read(self) -> np.ndarray:
    """The whole tensor."""
    array = np.empty(self.shape, self.dtype)
    copy_rows(self, array)
    return array


class Array(NamedTuple):
  """A tensor at hand, with what `Tensor` offers."""

  file: str | os.PathLike
  array: np.ndarray

  @property
  def shape(self) -> tuple[int, ...]:
    """The array's shape."""
    return self.array.shape

  @property
  def dtype(self) -> np.dtype:
    """The array's type."""
    return self.array.dtype

  def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
    """The whole array, as the only run."""
    yield 0, self.array


def copy_rows(tensor: Tensor | Array, target: np.ndarray) -> None:
  """Copies a tensor into a view of its shape; casts and, if the view does, transposes."""
  for start, block in tensor.blocks():
    rows = target[start : start + len(block)] if block.ndim else target
    np.copyto(rows, block, casting="unsafe")
