"""Reads PyTorch's zip checkpoints (`torch.save` since 1.6) without PyTorch, running no code.

A pickle may name any function and have it called. The reader here knows the few names that tensors
and containers need and refuses every other one, so a file can fail to load but can do nothing else.
"""

import io
import os
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rtdmd_jax.errors import UserError

_STORAGES = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}
# Types of one byte without a storage of their own: bytes, and the type with each tensor.
_BYTES = "UntypedStorage"
_DTYPES = {
  "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
  "float8_e5m2": ml_dtypes.float8_e5m2,
}
_MEMO = ("PUT", "BINPUT", "LONG_BINPUT")
_PICKLE_NAME = "data.pkl"
# Length of a zip entry's own header, and where its two variable lengths stand.
_ENTRY_HEADER, _ENTRY_LENGTHS = 30, slice(26, 30)
_BROKEN = (
  pickle.UnpicklingError,
  ArithmeticError,
  AttributeError,
  EOFError,
  LookupError,
  MemoryError,
  RuntimeError,  # of zipfile too: encrypted, or a method that it does not know
  TypeError,
  ValueError,
  struct.error,
)


def load_torch(path: str | os.PathLike) -> Any:
  """Reads a PyTorch checkpoint.

  Args:
    path: a file that `torch.save` wrote: tensors, numbers and strings in nested dicts, lists and
      tuples.

  Returns:
    What was saved, with read-only numpy arrays (bfloat16 by ml_dtypes) in place of tensors. They
    are views of the mapped file, so bytes are read when they are looked at.

  Raises:
    UserError: a missing, broken or legacy file, or a file that names a Python object other than
      tensors and containers; nothing of it is called.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(f"{path} is not a file; give a checkpoint that torch.save wrote.")
  if not zipfile.is_zipfile(path):
    raise UserError(
      f"{path} is no zip checkpoint of PyTorch (legacy or cut short); load it with PyTorch and"
      " save it again with torch.save."
    )
  try:
    with zipfile.ZipFile(path) as archive:
      root, entries = _entries(path, archive)
      program = archive.read(root + _PICKLE_NAME)
      _check_program(program)
      return _Unpickler(io.BytesIO(program), path, root, entries).load()
  except (*_BROKEN, zipfile.BadZipFile, zlib.error, OSError) as error:
    reason = str(error)[:200] or type(error).__name__
    raise UserError(f"{path} is not a readable PyTorch checkpoint ({reason}).") from error


def _check_program(program: bytes) -> None:
  """Refuses what would make the unpickler reserve memory at will: numbers beyond the data."""
  for opcode, argument, _ in pickletools.genops(program):
    if opcode.name in _MEMO and int(argument) > len(program):
      raise ValueError(f"a memo entry {argument} in a pickle of {len(program)} bytes")


def _entries(path: Path, archive: zipfile.ZipFile) -> tuple[str, dict[str, np.ndarray]]:
  """The archive's folder, and the bytes of its storages as views of the mapped file."""
  infos = {info.filename: info for info in archive.infolist()}
  pickles = [name for name in infos if name.split("/")[1:] == [_PICKLE_NAME]]
  if len(pickles) != 1:
    raise UserError(f"{path} is a zip file without one {_PICKLE_NAME}, so no PyTorch checkpoint.")
  root = pickles[0].removesuffix(_PICKLE_NAME)
  if root + "byteorder" in infos and archive.read(root + "byteorder") != b"little":
    raise UserError(f"{path} is big-endian; save it again on a little-endian machine.")
  data = np.memmap(path, np.uint8, "r")
  entries = {}
  for name, info in infos.items():
    if name.startswith(root + "data/"):
      if info.compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{path} is compressed; save it again with torch.save.")
      header = info.header_offset
      lengths = data[header : header + _ENTRY_HEADER][_ENTRY_LENGTHS].tobytes()
      start = header + _ENTRY_HEADER + sum(struct.unpack("<HH", lengths))
      entries[name] = data[start : start + info.file_size]
  return root, entries


class _StorageType(NamedTuple):
  """A stand-in for a storage class of PyTorch."""

  dtype: np.dtype


class _Function:
  """A callable without attributes, so that a pickle has nothing to change on it."""

  __slots__ = ()


class _RebuildTensor(_Function):
  """`torch._utils._rebuild_tensor_v2`: a strided view of a storage."""

  __slots__ = ()

  def __call__(self, storage, offset, size, stride, *_: Any) -> np.ndarray:
    if not isinstance(storage, np.ndarray) or storage.ndim != 1:
      raise ValueError("a tensor without a storage")
    numbers = [offset, *size, *stride]
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
      raise ValueError(f"a tensor of size {size}, stride {stride} and offset {offset}")
    if 0 in size:
      return np.empty(size, storage.dtype)
    # Views are not checked by numpy: this one must lie in its storage.
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= len(storage):
      raise ValueError(f"a tensor that ends at {last + 1} in a storage of {len(storage)} numbers")
    strides = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], tuple(size), strides, writeable=False)


class _RebuildTyped(_Function):
  """`torch._utils._rebuild_tensor_v3`: a strided view of bytes that are of a type."""

  __slots__ = ()

  def __call__(self, storage, offset, size, stride, _grad, _hooks, kind, *_: Any) -> np.ndarray:
    if not isinstance(kind, _StorageType) or kind.dtype.itemsize != 1:
      raise ValueError("a tensor without a type of one byte")
    return _RebuildTensor()(storage, offset, size, stride).view(kind.dtype)


class _RebuildParameter(_Function):
  """`torch._utils._rebuild_parameter`: the tensor inside."""

  __slots__ = ()

  def __call__(self, data, *_: Any) -> np.ndarray:
    if not isinstance(data, np.ndarray):
      raise ValueError("a parameter without a tensor")
    return data


class _MakeTuple(_Function):
  """`torch.Size`."""

  __slots__ = ()

  def __call__(self, items: Sequence[int] = ()) -> tuple[int, ...]:
    return tuple(items)


_GLOBALS: Mapping[tuple[str, str], Any] = {
  ("collections", "OrderedDict"): OrderedDict,
  ("torch", "Size"): _MakeTuple(),
  ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
  ("torch._utils", "_rebuild_tensor_v3"): _RebuildTyped(),
  ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
  ("torch.storage", _BYTES): _StorageType(np.dtype(np.uint8)),
} | {
  ("torch", name): _StorageType(np.dtype(dtype)) for name, dtype in (_STORAGES | _DTYPES).items()
}


class _Unpickler(pickle.Unpickler):
  def __init__(self, stream: Any, path: Path, root: str, entries: Mapping[str, np.ndarray]):
    super().__init__(stream)
    self._path, self._root, self._entries = path, root, entries

  def find_class(self, module: str, name: str) -> Any:
    """Overrides the import that a pickle asks for."""
    if (module, name) not in _GLOBALS:
      raise UserError(
        f"{self._path} asks for {module}.{name}, which is neither a tensor nor a container; it was"
        " not loaded."
      )
    return _GLOBALS[module, name]

  def persistent_load(self, pid: Any) -> np.ndarray:
    """The storage [n] that ("storage", type, key, device, n) names."""
    kind, storage, key, _, count = pid
    if kind != "storage" or not isinstance(storage, _StorageType):
      raise ValueError(f"a reference to {kind!r}")
    data = self._entries[f"{self._root}data/{key}"]
    if len(data) < count * storage.dtype.itemsize:
      raise ValueError(f"storage {key} has {len(data)} bytes, too few for {count} numbers")
    return np.frombuffer(data, storage.dtype, count)
