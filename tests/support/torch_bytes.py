"""Bytes of PyTorch's files, made without PyTorch."""

import io
import pickle
import zipfile
from typing import Any, NamedTuple

import numpy as np


class Storage(NamedTuple):
  pid: tuple


class Pickler(pickle._Pickler):
  """Writes references to storages and PyTorch's names, of which none is imported."""

  def save(self, obj, save_persistent_id=True):
    if isinstance(obj, str) and obj.startswith("torch"):
      self.write(pickle.GLOBAL + obj.encode() + b"\n")
    elif isinstance(obj, Tensor):
      self.save("torch._utils\n_rebuild_tensor_v2")
      self.save(obj.arguments)
      self.write(pickle.REDUCE)
    else:
      super().save(obj, save_persistent_id)

  def persistent_id(self, obj):
    return obj.pid if isinstance(obj, Storage) else None


class Tensor:
  def __init__(self, shape, **changes):
    count, strides = int(np.prod(shape)), (shape[-1], 1)
    storage = Storage(("storage", "torch\nFloatStorage", "0", "cpu", count))
    values = {"storage": storage, "offset": 0, "size": shape, "stride": strides} | changes
    self.arguments = (*values.values(), False, {})


def pickled(value: Any) -> bytes:
  stream = io.BytesIO()
  Pickler(stream, 2).dump(value)
  return stream.getvalue()


def zipped(program: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, "w", method) as archive:
    archive.writestr("archive/data.pkl", program)
    archive.writestr("archive/byteorder", b"little")
    archive.writestr("archive/data/0", np.ones(64, np.float32).tobytes())
  return stream.getvalue()
