"""The text and image encoders of CLIP (arXiv 2103.00020) in the layout of transformers.

One family for ViT-L/14, ViT-H/14 and ViT-bigG/14: widths, heads and activation come from
config.json. Parameters have transformers' names; the encoder layers of a tower are one stacked
subtree `layers`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from rtdmd_jax.models.attention import attention
from rtdmd_jax.models.clip_config import CLIPConfig, TextConfig, VisionConfig
from rtdmd_jax.models.convolution import convolve
from rtdmd_jax.models.layers import Dense
from rtdmd_jax.models.stack import stack_blocks
from rtdmd_jax.weights.key_table import KeyTable, Stack

TABLE = KeyTable(
  stacks=[
    Stack("text_model.layers", "text_model.encoder.layers"),
    Stack("vision_model.layers", "vision_model.encoder.layers"),
  ]
)
# transformers 5 writes a text encoder without projection with this prefix dropped.
BARE_TEXT_TABLE = KeyTable(
  stacks=[Stack("text_model.layers", "encoder.layers")], renames=[(r"^text_model\.", "")]
)
# A buffer, not a weight, that older transformers stored.
IGNORED_KEYS = (r".*\.position_ids",)


def _quick_gelu(x: jax.Array) -> jax.Array:
  return x * jax.nn.sigmoid(1.702 * x)


def _gelu(x: jax.Array) -> jax.Array:
  return jax.nn.gelu(x, approximate=False)


_ACTIVATIONS = {"quick_gelu": _quick_gelu, "gelu": _gelu}


class TextOutput(struct.PyTreeNode):
  """The outputs of a text encoder.

  Attributes:
    last: [B, L, D], the normalised output of the last layer.
    pooled: [B, D], `last` at the end-of-text token.
    projected: [B, P], the projection of `pooled`; None for an encoder without projection.
    hidden: [layers + 1, B, L, D], the inputs of all layers and the output of the last before the
      final norm, so `hidden[-2]` is the penultimate state of SD3; None unless asked for.
  """

  last: jax.Array
  pooled: jax.Array
  projected: jax.Array | None = None
  hidden: jax.Array | None = None


class CLIPText(nn.Module):
  """transformers' `CLIPTextModelWithProjection`, or `CLIPTextModel` without the projection."""

  config: TextConfig
  projection: bool
  dtype: Any = jnp.float32
  scan: bool = True

  def setup(self):
    """Names the parts as the checkpoint does."""
    self.text_model = TextTower(self.config, self.dtype, self.scan)
    if self.projection:
      self.text_projection = _projection(self.config.projection_dim, self.dtype)

  def __call__(self, ids: jax.Array, *, hidden: bool = False) -> TextOutput:
    """Encodes token ids [B, L]; see `TextTower`."""
    out = self.text_model(ids, hidden=hidden)
    return out.replace(projected=self.text_projection(out.pooled)) if self.projection else out


class CLIPVision(nn.Module):
  """transformers' `CLIPVisionModelWithProjection`."""

  config: VisionConfig
  dtype: Any = jnp.float32
  scan: bool = True

  def setup(self):
    """Names the parts as the checkpoint does."""
    self.vision_model = VisionTower(self.config, self.dtype, self.scan)
    self.visual_projection = _projection(self.config.projection_dim, self.dtype)

  def __call__(self, pixels: jax.Array) -> jax.Array:
    """Maps normalised images [B, S, S, 3] to projected features [B, P], of any length."""
    return self.visual_projection(self.vision_model(pixels))


class CLIP(nn.Module):
  """transformers' `CLIPModel`: both encoders with projections to one space, and a temperature."""

  config: CLIPConfig
  dtype: Any = jnp.float32
  scan: bool = True

  def setup(self):
    """Names the parts as the checkpoint does."""
    c = self.config
    self.text_model = TextTower(c.text, self.dtype, self.scan)
    self.vision_model = VisionTower(c.vision, self.dtype, self.scan)
    self.text_projection = _projection(c.projection_dim, self.dtype)
    self.visual_projection = _projection(c.projection_dim, self.dtype)
    initial = nn.initializers.constant(c.logit_scale_init_value)
    self.logit_scale = self.param("logit_scale", initial, ())

  def __call__(self, ids: jax.Array, pixels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maps ids [B, L] and pixels [N, S, S, 3] to (text [B, P], image [N, P], log temperature).

    The features are as projected, not normalised; logits are their cosines times
    `exp(log temperature)`.
    """
    return self.text_features(ids), self.image_features(pixels), self.logit_scale

  def text_features(self, ids: jax.Array) -> jax.Array:
    """Maps token ids [B, L] to projected features [B, P], of any length."""
    return self.text_projection(self.text_model(ids).pooled)

  def image_features(self, pixels: jax.Array) -> jax.Array:
    """Maps normalised images [B, S, S, 3] to projected features [B, P], of any length."""
    return self.visual_projection(self.vision_model(pixels))


def _projection(features: int, dtype: Any) -> Dense:
  return Dense(features, use_bias=False, dtype=dtype)


class TextTower(nn.Module):
  """Causal transformer over token ids.

  Every row of ids needs an end-of-text token; what follows it changes nothing before it, so no
  padding mask is taken.
  """

  config: TextConfig
  dtype: Any
  scan: bool

  @nn.compact
  def __call__(self, ids: jax.Array, *, hidden: bool = False) -> TextOutput:
    """Maps ids [B, L] to the output without projection; `hidden` keeps every layer's input."""
    c = self.config
    length = ids.shape[-1]
    if ids.ndim != 2 or length > c.max_position_embeddings:
      raise ValueError(
        f"ids are {ids.shape}, expected [B, L] with L <= {c.max_position_embeddings}"
      )
    x = TextEmbeddings(c, self.dtype, name="embeddings")(ids)
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
    stack = stack_blocks(Layer, c.num_hidden_layers, scan=self.scan, remat="none")
    x, inputs = stack(c, self.dtype, hidden, name="layers")(x, mask)
    states = jnp.concatenate([inputs, x[None]]) if hidden else None
    last = _layer_norm(c, self.dtype, "final_layer_norm")(x)
    # Configs from before extra tokens were allowed say 2; there the end has the highest id.
    end = ids if c.eos_token_id == 2 else ids == c.eos_token_id
    position = jnp.argmax(end, axis=-1)[:, None, None]
    pooled = jnp.take_along_axis(last, position, axis=1)[:, 0]
    return TextOutput(last=last, pooled=pooled, hidden=states)


class TextEmbeddings(nn.Module):
  """Token embedding plus learned position embedding."""

  config: TextConfig
  dtype: Any

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    """Maps ids [B, L] to [B, L, D]."""
    c = self.config
    tokens = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, name="token_embedding")
    positions = nn.Embed(
      c.max_position_embeddings, c.hidden_size, dtype=self.dtype, name="position_embedding"
    )
    return tokens(ids) + positions(jnp.arange(ids.shape[1]))


class VisionTower(nn.Module):
  """Transformer over patches and a class token."""

  config: VisionConfig
  dtype: Any
  scan: bool

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """Maps normalised images [B, S, S, 3] to the normalised class token [B, D]."""
    c = self.config
    expected = (c.image_size, c.image_size, c.num_channels)
    if pixels.ndim != 4 or pixels.shape[1:] != expected:
      raise ValueError(f"pixels are {pixels.shape}, expected [B, *{expected}]")
    x = VisionEmbeddings(c, self.dtype, name="embeddings")(pixels)
    # The spelling is the checkpoints'.
    x = _layer_norm(c, self.dtype, "pre_layrnorm")(x)
    stack = stack_blocks(Layer, c.num_hidden_layers, scan=self.scan, remat="none")
    x, _ = stack(c, self.dtype, False, name="layers")(x, None)
    return _layer_norm(c, self.dtype, "post_layernorm")(x[:, 0])


class VisionEmbeddings(nn.Module):
  """Class token and patch projections, plus learned position embedding."""

  config: VisionConfig
  dtype: Any

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """Maps [B, S, S, 3] to [B, 1 + (S / p)^2, D]."""
    c = self.config
    patches = nn.Conv(
      c.hidden_size,
      (c.patch_size, c.patch_size),
      strides=c.patch_size,
      padding=0,
      use_bias=False,
      dtype=self.dtype,
      conv_general_dilated=convolve,
      name="patch_embedding",
    )(pixels)
    batch = pixels.shape[0]
    patches = patches.reshape(batch, -1, c.hidden_size)
    start = self.param("class_embedding", nn.initializers.normal(0.02), (c.hidden_size,))
    start = jnp.broadcast_to(start.astype(self.dtype), (batch, 1, c.hidden_size))
    x = jnp.concatenate([start, patches], axis=1)
    positions = nn.Embed(x.shape[1], c.hidden_size, dtype=self.dtype, name="position_embedding")
    return x + positions(jnp.arange(x.shape[1]))


class Layer(nn.Module):
  """Pre-norm self-attention and feed-forward; gives its input back too where `keep` is set."""

  config: TextConfig | VisionConfig
  dtype: Any
  keep: bool

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Maps x [B, L, D], mask [1, 1, L, L] to (x after the layer, x before it or None)."""
    c = self.config
    before = x if self.keep else None
    y = _layer_norm(c, self.dtype, "layer_norm1")(x)
    x += SelfAttention(c.num_attention_heads, self.dtype, name="self_attn")(y, mask)
    y = _layer_norm(c, self.dtype, "layer_norm2")(x)
    x += FeedForward(c.intermediate_size, c.hidden_act, self.dtype, name="mlp")(y)
    return x, before


class SelfAttention(nn.Module):
  """Multi-head self-attention with biases."""

  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Maps x [B, L, D] to the same shape; mask as in `attention`."""
    width = x.shape[-1]
    q, k, v = (
      Dense(width, dtype=self.dtype, name=name)(x).reshape(*x.shape[:2], self.heads, -1)
      for name in ("q_proj", "k_proj", "v_proj")
    )
    y = attention(q, k, v, mask).reshape(x.shape)
    return Dense(width, dtype=self.dtype, name="out_proj")(y)


class FeedForward(nn.Module):
  """Dense, activation, dense."""

  features: int
  activation: str
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, L, D] to [B, L, D]."""
    y = _ACTIVATIONS[self.activation](Dense(self.features, dtype=self.dtype, name="fc1")(x))
    return Dense(x.shape[-1], dtype=self.dtype, name="fc2")(y)


def _layer_norm(config: TextConfig | VisionConfig, dtype: Any, name: str) -> nn.LayerNorm:
  # Two passes over the data: the fast variance cancels badly in float32.
  return nn.LayerNorm(config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name)
