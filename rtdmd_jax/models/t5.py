"""The encoder of T5 and T5 v1.1 (arXiv 1910.10683, 2002.05202) in the layout of transformers.

Parameters have the names of `T5EncoderModel`, with `_0` where a checkpoint key has `.0`. The
blocks are one stacked subtree `block`; the position bias, which checkpoints keep in the first
block although all share it, stands beside it.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.attention import attention
from rtdmd_jax.models.layers import Dense
from rtdmd_jax.models.norms import RMSNorm
from rtdmd_jax.models.stack import stack_blocks
from rtdmd_jax.models.transformer import check_types
from rtdmd_jax.weights.key_table import KeyTable, Stack

_BIAS = "relative_attention_bias"
TABLE = KeyTable(
  stacks=[Stack("block", "encoder.block")],
  renames=[
    (rf"^{_BIAS}$", f"encoder.block.0.layer.0.SelfAttention.{_BIAS}"),
    (r"^final_layer_norm$", "encoder.final_layer_norm"),
    (r"\blayer_(\d)\b", r"layer.\1"),
  ],
)
# A full T5 has a decoder, and some files repeat the shared embedding under the encoder's name.
IGNORED_KEYS = (r"decoder\..*", r"lm_head\.weight", r"encoder\.embed_tokens\.weight")
_FEED_FORWARDS = ("relu", "gated-gelu")


@dataclass(frozen=True)
class T5Config:
  """The fields of config.json that the encoder needs, with transformers' defaults."""

  vocab_size: int = 32128
  d_model: int = 512
  d_kv: int = 64
  d_ff: int = 2048
  num_layers: int = 6
  num_heads: int = 8
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  layer_norm_epsilon: float = 1e-6
  feed_forward_proj: str = "relu"

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "T5Config":
    """Reads config.json; transformers' many fields without a part in the computation are skipped.

    Raises:
      UserError: another model type, or a feed-forward layer that is not supported.
    """
    if config.get("model_type") != "t5":
      raise UserError(f"model_type is {config.get('model_type')!r} in a T5 config, expected 't5'.")
    values = {f.name: config[f.name] for f in fields(cls) if f.name in config}
    check_types("T5", cls, values)
    built = cls(**values)
    if built.feed_forward_proj not in _FEED_FORWARDS:
      raise UserError(
        f"feed_forward_proj is {built.feed_forward_proj!r}, expected {' or '.join(_FEED_FORWARDS)}."
      )
    return built


class T5Encoder(nn.Module):
  """transformers' `T5EncoderModel`."""

  config: T5Config
  dtype: Any = jnp.float32
  scan: bool = True

  @nn.compact
  def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Maps ids [B, L] to the normalised output of the last block, [B, L, D].

    Args:
      ids: token ids.
      mask: bool [B, L], False hides a token from the others. Without it padding takes part, as
        SD3 and FLUX.1 were trained.
    """
    c = self.config
    if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
      raise ValueError(f"ids are {ids.shape} and mask {getattr(mask, 'shape', None)}, not [B, L]")
    x = nn.Embed(c.vocab_size, c.d_model, dtype=self.dtype, name="shared")(ids)
    buckets = relative_buckets(
      ids.shape[1], c.relative_attention_num_buckets, c.relative_attention_max_distance
    )
    bias = nn.Embed(c.relative_attention_num_buckets, c.num_heads, dtype=self.dtype, name=_BIAS)(
      buckets
    )
    bias = bias.transpose(2, 0, 1)[None]
    mask = None if mask is None else mask.astype(bool)[:, None, None, :]
    stack = stack_blocks(Block, c.num_layers, scan=self.scan, remat="none")
    x, _ = stack(c, self.dtype, name="block")(x, bias, mask)
    return _norm(c, self.dtype, "final_layer_norm")(x)


@functools.lru_cache(maxsize=8)
def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
  """Bucket of every (query, key) pair, int32 [length, length].

  Half of the buckets are for keys after the query. In each half the first half holds one distance
  each, the rest grow logarithmically up to `max_distance` (arXiv 1910.10683, section 2.1).
  """
  offset = np.arange(length)[None, :] - np.arange(length)[:, None]
  half = buckets // 2
  exact = half // 2
  distance = np.abs(offset)
  # float32 throughout: at a power of the base the rounding decides the bucket.
  ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
  ratio = ratio / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
  far = np.minimum(exact + ratio.astype(np.int32), half - 1)
  bucket = np.where(distance < exact, distance, far)
  return (bucket + half * (offset > 0)).astype(np.int32)


class Block(nn.Module):
  """Self-attention, then feed-forward; the names are the checkpoint's."""

  config: T5Config
  dtype: Any

  @nn.compact
  def __call__(
    self, x: jax.Array, bias: jax.Array, mask: jax.Array | None
  ) -> tuple[jax.Array, None]:
    """Maps x [B, L, D], bias [1, H, L, L], mask [B, 1, 1, L] to x after the block."""
    x = AttentionLayer(self.config, self.dtype, name="layer_0")(x, bias, mask)
    return FeedForwardLayer(self.config, self.dtype, name="layer_1")(x), None


class AttentionLayer(nn.Module):
  """Normalised self-attention with a residual."""

  config: T5Config
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Maps x [B, L, D] to the same shape."""
    y = _norm(self.config, self.dtype, "layer_norm")(x)
    return x + SelfAttention(self.config, self.dtype, name="SelfAttention")(y, bias, mask)


class SelfAttention(nn.Module):
  """Attention with an additive position bias and no scale: training folded it into the weights."""

  config: T5Config
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Maps x [B, L, D] to the same shape."""
    c = self.config
    q, k, v = (
      _dense(c.num_heads * c.d_kv, self.dtype, name)(x).reshape(*x.shape[:2], c.num_heads, c.d_kv)
      for name in ("q", "k", "v")
    )
    y = attention(q, k, v, mask, bias=bias, scale=1.0)
    return _dense(c.d_model, self.dtype, "o")(y.reshape(*x.shape[:2], -1))


class FeedForwardLayer(nn.Module):
  """Normalised feed-forward with a residual."""

  config: T5Config
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, L, D] to the same shape."""
    y = _norm(self.config, self.dtype, "layer_norm")(x)
    return x + FeedForward(self.config, self.dtype, name="DenseReluDense")(y)


class FeedForward(nn.Module):
  """ReLU between two dense layers (T5), or a tanh-GELU gate beside the first (v1.1)."""

  config: T5Config
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, L, D] to [B, L, D]."""
    c = self.config
    if c.feed_forward_proj == "relu":
      y = nn.relu(_dense(c.d_ff, self.dtype, "wi")(x))
    else:
      y = nn.gelu(_dense(c.d_ff, self.dtype, "wi_0")(x), approximate=True)
      y *= _dense(c.d_ff, self.dtype, "wi_1")(x)
    return _dense(c.d_model, self.dtype, "wo")(y)


def _dense(features: int, dtype: Any, name: str) -> Dense:
  return Dense(features, use_bias=False, dtype=dtype, name=name)


def _norm(config: T5Config, dtype: Any, name: str) -> RMSNorm:
  return RMSNorm(config.layer_norm_epsilon, dtype, name=name)
