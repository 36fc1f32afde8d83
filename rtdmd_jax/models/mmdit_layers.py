"""Layers that SD3, FLUX.1 and FLUX.2 share, multimodal diffusion transformers (arXiv 2403.03206).

The time, and what else is one vector a sample, sets the shift, scale and gate of every block.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rtdmd_jax.models.embeddings import timestep_embedding
from rtdmd_jax.models.heads import split_heads
from rtdmd_jax.models.layers import Dense
from rtdmd_jax.models.norms import RMSNorm, layer_norm

# Names of modules that Flax cannot spell; see `KeyTable.renames`.
RENAMES = (
  (r"\bto_out_0$", "to_out.0"),
  (r"\bnet_0_proj$", "net.0.proj"),
  (r"\bnet_2$", "net.2"),
)
_zeros = nn.initializers.zeros


class Perceptron(nn.Module):
  """Dense, SiLU, dense."""

  features: int
  dtype: Any
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., D_in] to [..., features]."""
    x = nn.silu(Dense(self.features, self.use_bias, self.dtype, name="linear_1")(x))
    return Dense(self.features, self.use_bias, self.dtype, name="linear_2")(x)


class TimeTextEmbed(nn.Module):
  """Sum of the embedded time and, where a family has them, guidance scale and pooled text."""

  features: int
  dtype: Any
  use_bias: bool = True
  sinusoids: int = 256

  @nn.compact
  def __call__(
    self, sigma: jax.Array, pooled: jax.Array | None = None, guidance: jax.Array | None = None
  ) -> jax.Array:
    """Maps sigma [B], pooled [B, P] and guidance [B] to [B, features]."""
    # Both scalars stay float32 up to their sinusoids; published pipelines round them to bfloat16.
    inputs = {"timestep_embedder": self._sinusoids(sigma)}
    if guidance is not None:
      inputs["guidance_embedder"] = self._sinusoids(guidance)
    if pooled is not None:
      inputs["text_embedder"] = pooled
    return sum(
      Perceptron(self.features, self.dtype, self.use_bias, name=name)(x)
      for name, x in inputs.items()
    )

  def _sinusoids(self, value: jax.Array) -> jax.Array:
    return timestep_embedding(1000.0 * value.astype(jnp.float32), self.sinusoids)


class Modulation(nn.Module):
  """Shifts, scales and gates of one adaptive norm; zero at the start of training."""

  parts: int
  dtype: Any
  use_bias: bool = True

  @nn.compact
  def __call__(self, temb: jax.Array) -> list[jax.Array]:
    """Maps activated [B, D] to `parts` arrays [B, 1, D]."""
    features = self.parts * temb.shape[-1]
    out = Dense(features, self.use_bias, self.dtype, kernel_init=_zeros, name="linear")(temb)
    return jnp.split(out[:, None], self.parts, axis=-1)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """`x (1 + scale) + shift` for x [B, L, D] and [B, 1, D]."""
  return x * (1 + scale) + shift


def branch(
  x: jax.Array,
  layer: Callable[[jax.Array], jax.Array],
  shift: jax.Array,
  scale: jax.Array,
  gate: jax.Array,
  *,
  eps: float = 1e-6,
) -> jax.Array:
  """x [B, L, D] plus the gated output of a layer that sees it through an adaptive norm."""
  return x + gate * layer(modulate(layer_norm(x, eps), shift, scale))


def project_heads(
  x: jax.Array,
  names: tuple[str, str, str],
  norms: tuple[str, str] | None,
  *,
  heads: int,
  dtype: Any,
  use_bias: bool = True,
  eps: float = 1e-6,
) -> list[jax.Array]:
  """Query, key and value [B, L, H, D / H] of x [B, L, D], the first two normalised by `norms`.

  Call inside a compact method: the layers take the given names there.
  """
  qkv = [Dense(x.shape[-1], use_bias, dtype, name=name)(x) for name in names]
  qkv = [split_heads(y, heads) for y in qkv]
  if norms is not None:
    qkv[:2] = [RMSNorm(eps, dtype, name=n)(y) for n, y in zip(norms, qkv[:2], strict=True)]
  return qkv


def project_out(
  x: jax.Array,
  temb: jax.Array,
  features: int,
  *,
  dtype: Any,
  use_bias: bool = True,
  eps: float = 1e-6,
) -> jax.Array:
  """The last adaptive norm and layer, x [B, N, D] to [B, N, features]; zero before training.

  Call inside a compact method: the layers are `norm_out` and `proj_out` there.
  """
  scale, shift = Modulation(2, dtype, use_bias, name="norm_out")(temb)
  x = modulate(layer_norm(x, eps), shift, scale)
  return Dense(features, use_bias, dtype, _zeros, name="proj_out")(x)


class FeedForward(nn.Module):
  """Dense to four times the width, tanh-approximated GELU, dense back."""

  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, L, D] to [B, L, D]."""
    y = Dense(4 * x.shape[-1], dtype=self.dtype, name="net_0_proj")(x)
    return Dense(x.shape[-1], dtype=self.dtype, name="net_2")(nn.gelu(y, approximate=True))
