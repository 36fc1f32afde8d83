"""Embeddings of time and position."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def timestep_embedding(time: jax.Array, features: int = 256) -> jax.Array:
  """Cosines, then sines, of `time * 10000^(-i / half)`; [B] -> float32 [B, features]."""
  half = features // 2
  frequencies = np.exp(np.float32(-np.log(10000)) * np.arange(half, dtype=np.float32) / half)
  angles = time.astype(jnp.float32)[:, None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def sincos_table(size: int, base_size: int, features: int) -> jax.Array:
  """Fixed 2-D position table of SD3 (arXiv 2403.03206), [1, size * size, features] float32.

  The first half of the features encodes the column, the second the row. Positions are spread over
  [0, base_size), the patches along one side at the resolution the model was first trained at.
  """
  if features % 4:
    raise ValueError(f"a 2-D sine-cosine table needs features divisible by 4, not {features}")
  line = _sincos_line(size, base_size, features // 2)
  columns = jnp.broadcast_to(line[None], (size, size, features // 2))
  rows = jnp.broadcast_to(line[:, None], (size, size, features // 2))
  return jnp.concatenate([columns, rows], axis=-1).reshape(1, size * size, features)


@functools.lru_cache(maxsize=8)
def _sincos_line(size: int, base_size: int, features: int) -> np.ndarray:
  positions = np.arange(size, dtype=np.float32) / np.float32(size / base_size)
  frequencies = 1.0 / 10000 ** (np.arange(features // 2) / (features / 2))
  angles = np.outer(positions.astype(np.float64), frequencies)
  return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)
