import jax
import jax.numpy as jnp
import pytest

from rtdmd_jax.weights.key_table import KeyTable, Stack

TABLE = KeyTable(
  stacks=[Stack("encoder.early", "encoder.layers"), Stack("encoder.late", "encoder.layers", 2)],
  renames=[(r"\bto_out_0\b", "to_out.0")],
)


def leaf(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_modules_inside_and_outside_stacks():
  assert TABLE.modules(("encoder", "late", "attn", "to_out_0"), 2) == (
    "encoder.layers.2.attn.to_out.0",
    "encoder.layers.3.attn.to_out.0",
  )
  assert TABLE.modules(("encoder", "latest", "to_out_0")) == ("encoder.latest.to_out.0",)
  assert TABLE.modules(("encoder", "early"), 1) == ("encoder.layers.0",)
  with pytest.raises(ValueError, match="number of layers"):
    TABLE.modules(("encoder", "early", "fc"))


def test_entries_describe_layout():
  params = {
    "encoder": {"late": {"conv": {"kernel": leaf(2, 3, 5, 7, 11)}}},
    "proj": {"kernel": leaf(3, 4), "bias": leaf(4)},
  }
  conv, bias, kernel = TABLE.entries(params)
  assert conv.keys == ("encoder.layers.2.conv.weight", "encoder.layers.3.conv.weight")
  assert (conv.stacked, conv.shape, conv.axes) == (True, (11, 7, 3, 5), (3, 2, 0, 1))
  assert conv.inverse_axes == (2, 3, 1, 0)
  assert (kernel.keys, kernel.stacked, kernel.shape) == (("proj.weight",), False, (4, 3))
  assert (bias.keys, bias.shape, bias.path) == (("proj.bias",), (4,), ("proj", "bias"))


def test_two_leaves_for_one_key_is_an_error():
  with pytest.raises(ValueError, match="norm.weight"):
    KeyTable().entries({"norm": {"scale": leaf(2), "embedding": leaf(2)}})
