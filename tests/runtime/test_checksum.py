import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.runtime.checksum import checksums, fingerprint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32", "int8", "bool"])
def test_one_element_or_two_exchanged_change_the_sum(dtype):
  x = np.zeros((3, 4), dtype)
  x[1, 2] = 1
  moved = np.roll(x, 1, axis=1)
  first, second, third = checksums({"a": x, "b": moved, "c": np.zeros_like(x)}).values()
  assert len({first, second, third}) == 3 and third == 0


def test_the_sum_is_that_of_the_bits_by_position():
  x = np.array([[1.5, -0.0], [np.nan, 3e-45]], np.float32)
  bits = x.view(np.uint32).ravel().astype(np.uint64)
  wanted = int((bits * (2 * np.arange(4, dtype=np.uint64) + 1)).sum() % 2**32)
  assert checksums({"x": x}) == {"x": wanted}
  assert checksums({"n": jnp.int32(7)}) == {"n": 7}


def test_fingerprint_sees_names_shapes_types_and_values():
  tree = {"a": {"k": jnp.ones((2, 3))}, "b": jnp.arange(3)}
  others = [
    {"a": {"q": jnp.ones((2, 3))}, "b": jnp.arange(3)},
    {"a": {"k": jnp.ones((3, 2))}, "b": jnp.arange(3)},
    {"a": {"k": jnp.ones((2, 3), jnp.bfloat16)}, "b": jnp.arange(3)},
    {"a": {"k": jnp.ones((2, 3))}, "b": jnp.array([0, 2, 1])},
  ]
  prints = [fingerprint(t) for t in (tree, *others)]
  assert len(set(prints)) == 5 and prints[0] == fingerprint(jax.tree.map(jnp.copy, tree))
  assert fingerprint({}) == fingerprint({})
