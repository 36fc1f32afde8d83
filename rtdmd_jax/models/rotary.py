"""Rotary position embeddings (RoFormer, arXiv 2104.09864), of one or of several axes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.runtime import sharding

# Cosines and sines, each float32 [L, D / 2] for heads of D features.
Rotary = tuple[jax.Array, jax.Array]


def rotary_table(
  positions: np.ndarray, features: Sequence[int], theta: float, dtype: type = np.float64
) -> Rotary:
  """Cosine and sine of `position * theta^(-2 i / features)`, the axes side by side.

  Args:
    positions: [L, A], one coordinate an axis.
    features: A even numbers, the features of a head that each axis turns.
    theta: the base of the frequencies.
    dtype: precision of the angles; follow the checkpoint's reference.
  """
  if positions.shape[-1] != len(features) or any(n % 2 for n in features):
    raise ValueError(f"{positions.shape[-1]} coordinates for axes of {tuple(features)} features")
  angles = []
  for axis, size in enumerate(features):
    exponents = np.arange(0, size, 2, dtype=dtype) / dtype(size)
    frequencies = dtype(1.0) / dtype(theta) ** exponents
    angles.append(np.outer(positions[:, axis].astype(dtype), frequencies))
  turned = np.concatenate(angles, axis=-1)
  return jnp.asarray(np.cos(turned), jnp.float32), jnp.asarray(np.sin(turned), jnp.float32)


def rotate_pairs(x: jax.Array, rotary: Rotary) -> jax.Array:
  """Turns each pair of neighbouring features (FLUX); x [B, L, H, D] to the same."""
  cos, sin = (jnp.repeat(part, 2, axis=-1)[:, None] for part in rotary)
  return (x.astype(jnp.float32) * cos + _quarter_turn(x) * sin).astype(x.dtype)


def _quarter_turn(x: jax.Array) -> jax.Array:
  """(a, b) to (-b, a) for each pair of neighbouring features, in float32.

  For a TPU this is a product with a matrix of 0, 1 and -1, which is exact: it would copy every
  array of pairs several times, for their layout. Elsewhere a float32 product costs more.
  """
  if sharding.platform() != "tpu":
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    return jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
  turn = np.kron(np.eye(x.shape[-1] // 2), [[0, 1], [-1, 0]])
  return jnp.matmul(
    x,
    jnp.asarray(turn, x.dtype),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


def rotate_halves(x: jax.Array, rotary: Rotary) -> jax.Array:
  """Turns feature i together with feature i + D / 2 (Qwen); x [B, L, H, D] to the same."""
  cos, sin = (part[:, None] for part in rotary)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = first * cos - second * sin, second * cos + first * sin
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)
