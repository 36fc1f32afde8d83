"""The encoder of T5 v1.1 (arXiv 1910.10683), with the names of transformers' `T5EncoderModel`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.layers import Dense
from rtdmd_jax.models.stack import stack_blocks
from rtdmd_jax.weights.maps import KeyTable, Stack

_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
TABLE = KeyTable(
  stacks=[Stack("blocks", "encoder.block")],
  renames=[
    (r"^relative_attention_bias$", _BIAS),
    (r"^final_layer_norm$", "encoder.final_layer_norm"),
    (r"\.attention\b", ".layer.0.SelfAttention"),
    (r"\.attention_norm$", ".layer.0.layer_norm"),
    (r"\.feed_forward\b", ".layer.1.DenseReluDense"),
    (r"\.feed_forward_norm$", ".layer.1.layer_norm"),
  ],
)
# The tied copy of the embedding that transformers may write.
IGNORED_KEYS = ("encoder.embed_tokens.weight",)
_ACTIVATIONS = {
  "relu": nn.relu,
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "gelu_new": lambda x: nn.gelu(x, approximate=True),
}


@dataclass(frozen=True)
class T5Config:
  """The fields of config.json that shape the encoder."""

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
    """Reads a config.json; decoder and dropout fields do not matter here.

    Raises:
      UserError: a feed-forward form that is not supported.
    """
    built = cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})
    if built.activation not in _ACTIVATIONS:
      raise UserError(f"feed_forward_proj is {built.feed_forward_proj!r}, which is not supported.")
    return built

  @property
  def gated(self) -> bool:
    """Whether the feed-forward layer multiplies two branches."""
    return self.feed_forward_proj.startswith("gated-")

  @property
  def activation(self) -> str:
    """Name of the activation; a gated GELU means the tanh approximation."""
    name = self.feed_forward_proj.removeprefix("gated-")
    return "gelu_new" if self.feed_forward_proj == "gated-gelu" else name


def relative_buckets(length: int, buckets: int, max_distance: int) -> jax.Array:
  """Bucket [L, L] of key position minus query position: exact when near, logarithmic when far."""
  distance = jnp.arange(length)[None, :] - jnp.arange(length)[:, None]
  half = buckets // 2
  exact = half // 2
  far = jnp.maximum(jnp.abs(distance), 1).astype(jnp.float32) / exact
  far = exact + (jnp.log(far) / math.log(max_distance / exact) * (half - exact)).astype(jnp.int32)
  near = jnp.abs(distance)
  bucket = jnp.where(near < exact, near, jnp.minimum(far, half - 1))
  return bucket + half * (distance > 0)


class RMSNorm(nn.Module):
  """Scale by the root mean square, in float32, without centring."""

  eps: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., D] to the same shape."""
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
    return x.astype(self.dtype) * scale.astype(self.dtype)


class Attention(nn.Module):
  """Self-attention without biases or scaling, plus the position bias."""

  config: T5Config
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
    """Maps x [B, L, D] and bias [1, H, L, L] to [B, L, D]."""
    c = self.config
    b, length, _ = x.shape
    q, k, v = (
      Dense(c.num_heads * c.d_kv, use_bias=False, dtype=self.dtype, name=name)(x).reshape(
        b, length, c.num_heads, c.d_kv
      )
      for name in ("q", "k", "v")
    )
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) + bias
    weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, length, -1)
    return Dense(c.d_model, use_bias=False, dtype=self.dtype, name="o")(y)


class FeedForward(nn.Module):
  """Two dense layers around an activation, gated in version 1.1."""

  config: T5Config
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, L, D] to the same shape."""
    c = self.config
    dense = lambda size, name: Dense(size, use_bias=False, dtype=self.dtype, name=name)
    activate = _ACTIVATIONS[c.activation]
    if c.gated:
      y = activate(dense(c.d_ff, "wi_0")(x)) * dense(c.d_ff, "wi_1")(x)
    else:
      y = activate(dense(c.d_ff, "wi")(x))
    return dense(c.d_model, "wo")(y)


class Block(nn.Module):
  """Pre-norm attention and feed-forward."""

  config: T5Config
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
    """Maps x [B, L, D] to the same shape."""
    eps = self.config.layer_norm_epsilon
    y = RMSNorm(eps, self.dtype, name="attention_norm")(x)
    x = x + Attention(self.config, self.dtype, name="attention")(y, bias)
    y = RMSNorm(eps, self.dtype, name="feed_forward_norm")(x)
    return x + FeedForward(self.config, self.dtype, name="feed_forward")(y), None


class T5Encoder(nn.Module):
  """Token embeddings to contextual ones; padding is not masked, as in diffusers' pipelines."""

  config: T5Config
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    """Maps ids [B, L] to [B, L, D]."""
    c = self.config
    x = nn.Embed(
      c.vocab_size, c.d_model, dtype=self.dtype, embedding_init=nn.initializers.normal(1.0),
      name="shared",
    )(ids)
    table = nn.Embed(
      c.relative_attention_num_buckets, c.num_heads, name="relative_attention_bias"
    )
    buckets = relative_buckets(
      ids.shape[1], c.relative_attention_num_buckets, c.relative_attention_max_distance
    )
    bias = jnp.moveaxis(table(buckets), -1, 0)[None]
    stack = stack_blocks(Block, c.num_layers, scan=True, remat="none")
    x, _ = stack(c, self.dtype, name="blocks")(x, bias)
    return RMSNorm(c.layer_norm_epsilon, self.dtype, name="final_layer_norm")(x)
