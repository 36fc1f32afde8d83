import os
import stat

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from rtdmd_jax.runtime.files import replace_file, replace_text, save_tensors


def mode(path):
  return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, mask):
  before = os.umask(mask)
  try:
    save_tensors(tmp_path / "a/x.safetensors", {"x": np.ones(3, np.float32)}, {"step": "3"})
    replace_text(tmp_path / "a/x.txt", "ä")
  finally:
    os.umask(before)
  assert mode(tmp_path / "a/x.safetensors") == mode(tmp_path / "a/x.txt") == 0o666 & ~mask
  assert load_file(tmp_path / "a/x.safetensors")["x"].sum() == 3
  assert (tmp_path / "a/x.txt").read_text("utf-8") == "ä"


def test_the_same_tensors_are_the_same_bytes(tmp_path):
  notes = {str(i): "ä" * i for i in range(9)}
  tensors = {f"k{i}": np.full((i, 2), i, np.float32) for i in range(1, 5)}
  for name in ("a", "b"):
    save_tensors(tmp_path / name, tensors, notes)
  assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
  with safe_open(tmp_path / "a", framework="numpy") as file:
    assert file.metadata() == notes | {"format": "pt"}
    for key, value in tensors.items():
      np.testing.assert_array_equal(file.get_tensor(key), value)


def test_a_file_is_replaced_whole_or_stays(tmp_path):
  file = tmp_path / "x"
  replace_text(file, "old")

  def fails(partial):
    partial.write_text("ne")
    raise OSError("full")

  with pytest.raises(OSError, match="full"):
    replace_file(file, fails)
  assert file.read_text() == "old"
  replace_text(file, "new")  # what the failure left is in nobody's way
  assert [p.name for p in tmp_path.iterdir()] == ["x"] and file.read_text() == "new"
