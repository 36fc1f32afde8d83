import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from rtdmd_jax.errors import UserError
from rtdmd_jax.weights.torch_file import load_torch


class Global:
  """Pickles as a call of a function by name, which need not exist here."""

  def __init__(self, function, *args):
    self.function, self.args = function, args

  def __reduce__(self):
    return self.function, self.args


def named(module, name):
  def function():
    raise AssertionError("never called")

  function.__module__, function.__qualname__, function.__name__ = module, name, name
  return function


class Pickler(pickle._Pickler):
  """The Python pickler, which is told to believe in names that cannot be imported."""

  def save_global(self, obj, name=None):
    self.write(pickle.GLOBAL + f"{obj.__module__}\n{obj.__qualname__}\n".encode())

  def persistent_id(self, obj):
    return obj.pid if isinstance(obj, Storage) else None

  dispatch = pickle._Pickler.dispatch | {type(named): save_global}


class Storage:
  def __init__(self, key="0", count=6, kind="FloatStorage", tag="storage"):
    self.pid = (tag, named("torch", kind), key, "cpu", count)


def tensor(size=(2, 3), stride=(3, 1), offset=0, storage=None, rebuild="_rebuild_tensor_v2"):
  storage = Storage() if storage is None else storage
  function = named("torch._utils", rebuild)
  return Global(function, storage, offset, size, stride, False, OrderedDict())


def write(path, value, numbers=(0, 1, 2, 3, 4, 5), compression=zipfile.ZIP_STORED, order=b"little"):
  with zipfile.ZipFile(path, "w", compression) as archive:
    with archive.open("archive/data.pkl", "w") as stream:
      Pickler(stream, 2).dump(value)
    archive.writestr("archive/byteorder", order)
    archive.writestr("archive/data/0", np.asarray(numbers, np.float32).tobytes())
  return path


def test_a_strided_tensor_is_a_view_of_the_file(tmp_path):
  got = load_torch(
    write(tmp_path / "f.pt", {"x": tensor((3, 2), (1, 3)), "n": [1, 2.5, "s", None]})
  )
  np.testing.assert_array_equal(got["x"], np.arange(6, dtype=np.float32).reshape(2, 3).T)
  assert got["n"] == [1, 2.5, "s", None]
  assert not got["x"].flags.writeable
  owner = got["x"]
  while getattr(owner, "base", None) is not None:
    owner = owner.base
  assert type(owner).__name__ == "mmap"


@pytest.mark.parametrize("function", [os.system, eval, getattr, np.load])
def test_other_names_are_refused_and_not_called(tmp_path, function):
  marker = tmp_path / "ran"
  path = tmp_path / "evil.pt"
  write(path, {"x": tensor()})
  payload = pickle.dumps({"w": Global(function, f"touch {marker}")}, 2)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", payload)
  with pytest.raises(UserError, match=rf"evil\.pt asks for \S+\.{function.__name__}, which"):
    load_torch(path)
  assert not marker.exists()


def test_the_readers_own_functions_cannot_be_changed(tmp_path):
  path = write(tmp_path / "f.pt", {"x": tensor()})
  # BUILD with a slot state would set attributes on the function itself.
  payload = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x08\x00\x00\x00__call__K\x01s\x86b."
  bad = tmp_path / "bad.pt"
  with zipfile.ZipFile(bad, "w") as archive:
    archive.writestr("archive/data.pkl", payload)
  with pytest.raises(UserError, match="not a readable PyTorch checkpoint"):
    load_torch(bad)
  assert load_torch(path)["x"].shape == (2, 3)


@pytest.mark.parametrize(
  "value",
  [
    tensor((2, 4), (3, 1)),
    tensor((2, 3), (3, 1), offset=1),
    tensor((2, 3), (3, -1)),
    tensor((2, 3), (1,)),
    tensor((2, 3), (3, 1), offset=-1),
    tensor(storage=Storage(count=7)),
    tensor(storage=Storage(key="1")),
    tensor(storage=Storage(tag="module")),
    tensor(storage="not a storage"),
  ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, value):
  with pytest.raises(UserError, match=r"f\.pt is not a readable PyTorch checkpoint"):
    load_torch(write(tmp_path / "f.pt", value))


@pytest.mark.parametrize(
  "value, name",
  [
    (tensor(storage=Storage(kind="QInt8Storage")), r"torch\.QInt8Storage"),
    (tensor(rebuild="_rebuild_sparse_tensor"), r"_rebuild_sparse_tensor"),
  ],
)
def test_kinds_that_are_not_read_are_named(tmp_path, value, name):
  with pytest.raises(UserError, match=name):
    load_torch(write(tmp_path / "f.pt", value))


def test_files_of_another_kind(tmp_path):
  with pytest.raises(UserError, match="is not a file"):
    load_torch(tmp_path / "none.pt")
  legacy = tmp_path / "legacy.pt"
  legacy.write_bytes(pickle.dumps(1))
  with pytest.raises(UserError, match=r"legacy\.pt is no zip checkpoint"):
    load_torch(legacy)
  with zipfile.ZipFile(tmp_path / "z.pt", "w") as archive:
    archive.writestr("readme", "x")
  with pytest.raises(UserError, match="without one data.pkl"):
    load_torch(tmp_path / "z.pt")
  with pytest.raises(UserError, match="compressed"):
    load_torch(write(tmp_path / "c.pt", tensor(), compression=zipfile.ZIP_DEFLATED))
  with pytest.raises(UserError, match="big-endian"):
    load_torch(write(tmp_path / "b.pt", tensor(), order=b"big"))
