"""The start of fresh adapters against PEFT's own."""

import jax
import numpy as np
import pytest

from rtdmd_jax.adapters import lora
from rtdmd_jax.weights.key_table import KeyTable

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("rank", [4, 32])
def test_gaussian_is_peft_s(rank):
  torch.manual_seed(0)
  layer = torch.nn.Sequential(torch.nn.Linear(3000, 6))
  options = dict(r=rank, target_modules=["0"], init_lora_weights="gaussian")
  adapted = peft.inject_adapter_in_model(peft.LoraConfig(**options), layer)[0]
  theirs = adapted.lora_A["default"].weight.detach().numpy()
  ours = lora.build_adapters(
    {"fc": {"kernel": jax.ShapeDtypeStruct((3000, 6), "float32")}},
    KeyTable(stacks=[], renames=[]),
    ["fc"],
    rank=rank,
    key=jax.random.key(0),
  )["fc"]
  assert not adapted.lora_B["default"].weight.any() and not np.any(ours["b"])
  for a in (theirs, np.asarray(ours["a"])):
    assert a.size == 3000 * rank
    assert abs(a.mean()) < 0.03 / rank
    np.testing.assert_allclose(a.std(), 1 / rank, rtol=0.02)
    np.testing.assert_allclose(np.mean(a**4), 3 / rank**4, rtol=0.1)
