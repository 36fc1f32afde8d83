"""Kernels as int8: their error, their shapes, and how the loader makes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from safetensors.numpy import save_file

from rtdmd_jax.runtime import sharding
from rtdmd_jax.weights.int8 import int8_shapes, quantise
from rtdmd_jax.weights.key_table import KeyTable, Stack
from rtdmd_jax.weights.safetensors import load_params

TABLE = KeyTable(stacks=[Stack("blocks", "layers")])


def kernel(*shape, seed=0):
  rng = np.random.default_rng(seed)
  # Channels of very different sizes.
  return (rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 3, shape[-1])).astype(np.float32)


def tree():
  return {
    "blocks": {"to_q": {"kernel": kernel(3, 8, 16), "bias": kernel(3, 16)}},
    "proj": {"kernel": kernel(2, 2, 4, 8)},
    "last": {"kernel": kernel(8, 6)},
  }


def shapes():
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), tree())


@pytest.fixture
def file(tmp_path):
  t = tree()
  tensors = {f"layers.{i}.to_q.weight": t["blocks"]["to_q"]["kernel"][i].T for i in range(3)}
  tensors |= {f"layers.{i}.to_q.bias": t["blocks"]["to_q"]["bias"][i] for i in range(3)}
  tensors |= {"proj.weight": np.einsum("hwio->oihw", t["proj"]["kernel"])}
  tensors |= {"last.weight": t["last"]["kernel"].T}
  save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / "m.safetensors")
  return tmp_path / "m.safetensors"


def test_a_weight_moves_by_half_a_scale_at_most_and_the_largest_not_at_all():
  weights = kernel(300, 20)
  values, scale = quantise(weights)
  assert (values.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (20,))
  error = np.abs(values.astype(np.float64) * scale - weights)
  assert (error <= 0.5001 * scale).all() and (error.max(axis=0) > 0.45 * scale).all()
  np.testing.assert_array_equal(np.abs(values).max(axis=0), 127)
  np.testing.assert_allclose(scale, np.abs(weights).max(axis=0) / 127, rtol=1e-6)


def test_channels_of_zeros_and_channels_that_are_not_finite():
  weights = kernel(4, 5)
  weights[:, 0], weights[1, 1], weights[2, 2] = 0, np.nan, np.inf
  weights[:, 3] = [1e-45, 0, 0, -1e-45]  # the least there is
  values, scale = quantise(weights)
  np.testing.assert_array_equal(values[:, 0], 0)
  assert np.isfinite(scale[[0, 3, 4]]).all() and (scale > 0)[[0, 3, 4]].all()
  assert not np.isfinite(scale[[1, 2]]).any()


def test_shapes_of_dense_kernels_change_alone():
  got = int8_shapes(shapes(), TABLE)
  want = shapes()
  want["blocks"]["to_q"] |= {
    "kernel": jax.ShapeDtypeStruct((3, 8, 16), jnp.int8),
    "kernel_scale": jax.ShapeDtypeStruct((3, 16), jnp.float32),
  }
  want["last"] = {
    "kernel": jax.ShapeDtypeStruct((8, 6), jnp.int8),
    "kernel_scale": jax.ShapeDtypeStruct((6,), jnp.float32),
  }
  assert got == want


def test_the_loader_quantises_each_layer_of_a_stack(file):
  got = load_params(file, int8_shapes(shapes(), TABLE), TABLE, dtype=jnp.bfloat16)
  structs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), got)
  assert structs == int8_shapes(shapes(), TABLE)
  stack = got["blocks"]["to_q"]
  for i, layer in enumerate(tree()["blocks"]["to_q"]["kernel"]):
    values, scale = quantise(layer)
    np.testing.assert_array_equal(stack["kernel"][i], values)
    np.testing.assert_array_equal(stack["kernel_scale"][i], scale)
  np.testing.assert_array_equal(got["last"]["kernel"], quantise(tree()["last"]["kernel"])[0])


def test_the_loader_puts_kernel_and_scales_where_the_table_says(file):
  mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)
  with jax.set_mesh(mesh):
    got = load_params(file, int8_shapes(shapes(), TABLE), TABLE)["blocks"]["to_q"]
  assert got["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
  assert got["kernel_scale"].sharding.spec == PartitionSpec(None, "tensor")
