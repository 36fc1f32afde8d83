"""Checksums of arrays, computed where the arrays lie and equal on every mesh."""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from rtdmd_jax.runtime.sharding import on_host, to_device


def checksums(arrays: dict[str, Any]) -> dict[str, int]:
  """A 32-bit sum of each array's bit patterns, weighted by position.

  The weights are odd, so any change of a single element changes the sum. Sums of integers do not
  depend on their order, hence not on how an array is split over devices.

  Args:
    arrays: by name; elements of 1, 2 or 4 bytes.
  """
  here = {name: array for name, array in arrays.items() if not on_host(array)}
  sums = dict(zip(here, _sums(list(here.values())), strict=True))
  for name in arrays.keys() - here.keys():  # one after the other, for the device's memory
    (sums[name],) = _sums([arrays[name]])
  return {name: int(value) for name, value in jax.device_get(sums).items()}


def fingerprint(tree: Any) -> str:
  """Eight hexadecimal digits of a tree's names, shapes, types and values."""
  leaves = {
    jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  sums = checksums(leaves)
  text = "\n".join(f"{n} {leaves[n].dtype}{leaves[n].shape} {sums[n]}" for n in sorted(leaves))
  return f"{zlib.crc32(text.encode()):08x}"


@jax.jit
def _sums(arrays: list[jax.Array]) -> list[jax.Array]:
  return [_sum(array) for array in to_device(arrays)]


def _sum(x: jax.Array) -> jax.Array:
  x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
  bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
  position = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    stride = jnp.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
    position += stride * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)
