"""Features of all heads in one axis, and heads as an axis of their own."""

import jax

from rtdmd_jax.runtime import sharding

# What a TPU keeps together of an array's last two axes.
_ROWS, _LANES = 8, 128


def split_heads(x: jax.Array, heads: int) -> jax.Array:
  """Maps [B, L, H D] to [B, L, H, D]."""
  b, length, features = x.shape
  width = features // heads
  if not _by_tiles(length, width):
    return x.reshape(b, length, heads, width)
  x = x.reshape(b, length // _ROWS, _ROWS, heads, width).transpose(0, 3, 1, 2, 4)
  return x.reshape(b, heads, length, width).swapaxes(1, 2)


def join_heads(x: jax.Array) -> jax.Array:
  """Maps [B, L, H, D] to [B, L, H D]."""
  b, length, heads, width = x.shape
  if _by_tiles(length, width):
    x = x.swapaxes(1, 2).reshape(b, heads, length // _ROWS, _ROWS, width)
    x = x.transpose(0, 2, 3, 1, 4)
  return x.reshape(b, length, heads * width)


def _by_tiles(length: int, width: int) -> bool:
  """Whether to move whole tiles; the numbers are those of a plain reshape.

  Kernels of attention want [B, H, L, D] in memory. For a plain reshape a TPU's compiler transposes
  everything twice, to the tokens of a feature side by side and back; of tiles it is one copy.
  """
  return sharding.platform() == "tpu" and length % _ROWS == 0 and width % _LANES == 0
