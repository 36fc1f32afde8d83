"""Published weights as PyTorch files."""

import numpy as np
import pytest

from rtdmd_jax.errors import UserError
from rtdmd_jax.weights.state_dict import read_state_dict

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: {"epoch": 1, "state_dict": d}])
def test_bare_and_wrapped(tmp_path, wrap):
  layer = torch.nn.Linear(3, 2).half()
  torch.save(wrap(layer.state_dict()), tmp_path / "a.pth")
  found = read_state_dict(tmp_path / "a.pth")
  assert found.keys() == {"weight", "bias"} and found["weight"].dtype == np.float16
  np.testing.assert_array_equal(found["weight"], layer.weight.detach().numpy())


@pytest.mark.parametrize(
  ("value", "message"),
  [
    ([torch.ones(1)], "holds a list"),
    ({}, "holds a dict, expected"),
    ({"a": torch.ones(1), "step": 3}, "holds 'step', a int, among"),
  ],
)
def test_other_contents_are_refused(tmp_path, value, message):
  torch.save(value, tmp_path / "a.pt")
  with pytest.raises(UserError, match=f"a.pt {message}"):
    read_state_dict(tmp_path / "a.pt")
