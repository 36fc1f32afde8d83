"""Normalisations with float32 statistics."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rtdmd_jax.runtime.sharding import constrain


def layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
  """Zero mean and unit variance over the last axis of [..., D], without learned scale or shift."""
  y = constrain(x).astype(jnp.float32)
  y -= y.mean(-1, keepdims=True)
  return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nn.Module):
  """`x / sqrt(mean(x^2) + eps) * scale` over the last axis of [..., D] (arXiv 1910.07467)."""

  eps: float = 1e-6
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., D] to [..., D]."""
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
    return y.astype(self.dtype) * scale.astype(self.dtype)
