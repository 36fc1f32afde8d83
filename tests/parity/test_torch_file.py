"""Files that PyTorch wrote, read without it."""

from collections import OrderedDict

import ml_dtypes  # noqa: F401  registers its types with numpy
import numpy as np
import pytest

from rtdmd_jax.errors import UserError
from rtdmd_jax.weights.torch_file import load_torch

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")
DTYPES += ("float8_e4m3fn", "float8_e5m2")


def as_numpy(tensor):
  if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
    return tensor.float().numpy().astype(str(tensor.dtype).removeprefix("torch."))
  return tensor.detach().numpy()


def test_every_type_and_layout(tmp_path):
  torch.manual_seed(0)
  base = 10 * torch.randn(5, 6)
  tensors = {name: base.to(getattr(torch, name)) for name in DTYPES}
  tensors |= {"bool": base > 0, "transposed": base.T, "cut": base[1:4, ::2]}
  tensors |= {"expanded": base[:, :1].expand(5, 3), "scalar": base.sum(), "empty": base[:0]}
  torch.save(tensors, tmp_path / "t.pt")
  got = load_torch(tmp_path / "t.pt")
  assert got.keys() == tensors.keys()
  for key, tensor in tensors.items():
    want = as_numpy(tensor)
    assert got[key].dtype == want.dtype and got[key].shape == want.shape, key
    np.testing.assert_array_equal(got[key], want, err_msg=key)


def test_a_modules_state_and_nested_values(tmp_path):
  module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
  saved = {
    "state": module.state_dict(),
    "parameter": torch.nn.Parameter(torch.ones(2, 3)),
    "list": [1, 2.5, "s", None, True, (torch.zeros(2), torch.Size([3, 4]))],
    "ordered": OrderedDict(a=1),
    "big": 2**40,
  }
  torch.save(saved, tmp_path / "t.pt")
  got = load_torch(tmp_path / "t.pt")
  for key, tensor in module.state_dict().items():
    np.testing.assert_array_equal(got["state"][key], tensor.numpy())
  np.testing.assert_array_equal(got["parameter"], np.ones((2, 3)))
  assert got["list"][:5] == saved["list"][:5] and got["list"][5][1] == (3, 4)
  assert got["ordered"] == {"a": 1} and got["big"] == 2**40


def test_what_pytorch_would_run_is_refused(tmp_path):
  torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
  with pytest.raises(UserError, match=r"module\.pt asks for torch\.nn\.modules\.linear\.Linear"):
    load_torch(tmp_path / "module.pt")
  torch.save({"x": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
  with pytest.raises(UserError, match="legacy"):
    load_torch(tmp_path / "old.pt")
