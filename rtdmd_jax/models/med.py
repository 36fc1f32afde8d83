"""BERT with cross-attention to an image, the text encoder of BLIP (arXiv 2201.12086).

Modules carry the names of BLIP's `med.py`, so that checkpoints of BLIP and ImageReward load.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.attention import attention
from rtdmd_jax.models.layers import Dense
from rtdmd_jax.models.stack import stack_blocks


@dataclass(frozen=True)
class MedConfig:
  """The fields of `med_config.json` that the computation needs; defaults are ImageReward's."""

  vocab_size: int = 30524
  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  max_position_embeddings: int = 512
  layer_norm_eps: float = 1e-12

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "MedConfig":
    """Reads med_config.json; `encoder_width` is not read, the image encoder has the last word.

    Raises:
      UserError: no cross-attention, another activation, or a width that heads do not divide.
    """
    for key, wanted in (("hidden_act", "gelu"), ("add_cross_attention", True)):
      if config.get(key, wanted) != wanted:
        raise UserError(f"{key} in med_config.json is {config[key]!r}; only {wanted!r} is known.")
    built = cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})
    if built.hidden_size % built.num_attention_heads:
      raise UserError(
        f"hidden_size in med_config.json is {built.hidden_size}, not a multiple of"
        f" num_attention_heads {built.num_attention_heads}."
      )
    return built


class Med(nn.Module):
  """BLIP's `BertModel` without pooler, in its multimodal mode."""

  config: MedConfig
  dtype: Any = jnp.float32
  scan: bool = True

  @nn.compact
  def __call__(self, ids: jax.Array, mask: jax.Array, image: jax.Array) -> jax.Array:
    """Encodes text that looks at an image.

    Args:
      ids: [B, L] tokens.
      mask: bool [B, L], False at padding.
      image: [B, N, W] tokens of the image, all of them visible.

    Returns:
      [B, L, D], the last layer's states.
    """
    c = self.config
    if ids.ndim != 2 or ids.shape[1] > c.max_position_embeddings:
      raise ValueError(f"ids are {ids.shape}, expected [B, L <= {c.max_position_embeddings}]")
    x = MedEmbeddings(c, self.dtype, name="embeddings")(ids)
    return MedLayers(c, self.dtype, self.scan, name="encoder")(x, mask[:, None, None], image)


class MedEmbeddings(nn.Module):
  """Word plus position, normalised; there are no segments."""

  config: MedConfig
  dtype: Any

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    """Maps ids [B, L] to [B, L, D]."""
    c = self.config
    embed = partial(nn.Embed, features=c.hidden_size, dtype=self.dtype)
    words = embed(c.vocab_size, name="word_embeddings")(ids)
    table = embed(c.max_position_embeddings, name="position_embeddings")
    positions = table(jnp.arange(ids.shape[1]))
    return _norm(c, self.dtype)(words + positions)


class MedLayers(nn.Module):
  """All layers, stacked."""

  config: MedConfig
  dtype: Any
  scan: bool

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array, image: jax.Array) -> jax.Array:
    """Maps x [B, L, D] to the same shape; mask [B, 1, 1, L]."""
    stack = stack_blocks(MedLayer, self.config.num_hidden_layers, scan=self.scan, remat="none")
    return stack(self.config, self.dtype, name="layer")(x, mask, image)[0]


class MedLayer(nn.Module):
  """Self-attention, attention to the image, feed-forward; each normalised after its residual."""

  config: MedConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array, image: jax.Array) -> tuple[jax.Array, None]:
    """Maps x [B, L, D] to (x after the layer, None)."""
    c = self.config
    x = MedAttention(c, self.dtype, name="attention")(x, x, mask)
    x = MedAttention(c, self.dtype, name="crossattention")(x, image.astype(x.dtype), None)
    hidden = MedDense(c.intermediate_size, self.dtype, name="intermediate")(x)
    hidden = jax.nn.gelu(hidden, approximate=False)
    return MedOutput(c, self.dtype, name="output")(hidden, x), None


class MedAttention(nn.Module):
  """Multi-head attention from x to `source`, with residual and norm."""

  config: MedConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, source: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Maps x [B, L, D] and source [B, N, W] to [B, L, D]."""
    y = MedSelfAttention(self.config, self.dtype, name="self")(x, source, mask)
    return MedOutput(self.config, self.dtype, name="output")(y, x)


class MedSelfAttention(nn.Module):
  """The three projections and the attention itself."""

  config: MedConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, source: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Maps x [B, L, D] and source [B, N, W] to [B, L, D]."""
    c = self.config
    q, k, v = (
      Dense(c.hidden_size, dtype=self.dtype, name=name)(y).reshape(
        *y.shape[:2], c.num_attention_heads, -1
      )
      for name, y in (("query", x), ("key", source), ("value", source))
    )
    return attention(q, k, v, mask).reshape(x.shape)


class MedDense(nn.Module):
  """A dense layer one level down, as the checkpoint nests it."""

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, L, D] to [B, L, features]."""
    return Dense(self.features, dtype=self.dtype, name="dense")(x)


class MedOutput(nn.Module):
  """Dense, residual and norm."""

  config: MedConfig
  dtype: Any

  @nn.compact
  def __call__(self, y: jax.Array, x: jax.Array) -> jax.Array:
    """Maps y [B, L, *] and the residual x [B, L, D] to [B, L, D]."""
    y = Dense(self.config.hidden_size, dtype=self.dtype, name="dense")(y)
    return _norm(self.config, self.dtype)(y + x)


def _norm(config: MedConfig, dtype: Any) -> nn.LayerNorm:
  return nn.LayerNorm(config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name="LayerNorm")
