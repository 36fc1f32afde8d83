"""BLIP's image encoder (arXiv 2201.12086) and ImageReward's network on top (arXiv 2304.05977).

Modules carry the names of the ImageReward package's checkpoint.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rtdmd_jax.models import score_head
from rtdmd_jax.models.attention import attention
from rtdmd_jax.models.convolution import convolve
from rtdmd_jax.models.layers import Dense
from rtdmd_jax.models.med import Med, MedConfig
from rtdmd_jax.models.stack import stack_blocks
from rtdmd_jax.weights.key_table import KeyTable, Stack

TABLE = KeyTable(
  stacks=[
    Stack(name, name) for name in ("blip.visual_encoder.blocks", "blip.text_encoder.encoder.layer")
  ],
  renames=score_head.RENAMES,
)
# A buffer, and the projections of BLIP's contrastive loss, which the reward does not use.
IGNORED_KEYS = (r".*\.position_ids", r"blip\.(vision_proj|text_proj)\.(weight|bias)")


@dataclass(frozen=True)
class BlipVisionConfig:
  """Sizes of the image encoder; the defaults are BLIP's `large`."""

  hidden_size: int = 1024
  num_hidden_layers: int = 24
  num_attention_heads: int = 16
  image_size: int = 224
  patch_size: int = 16


class ImageRewardNet(nn.Module):
  """BLIP reading the prompt before the image, and a score from its first token."""

  vision: BlipVisionConfig
  text: MedConfig
  dtype: Any = jnp.float32
  scan: bool = True

  def setup(self):
    """Names the parts as the checkpoint does."""
    self.blip = Blip(self.vision, self.text, self.dtype, self.scan)
    self.mlp = score_head.ScoreHead()

  def __call__(self, ids: jax.Array, mask: jax.Array, pixels: jax.Array) -> jax.Array:
    """Maps ids [B, L], mask [B, L] and normalised images [B, S, S, 3] to raw scores [B]."""
    return self.mlp(self.blip(ids, mask, pixels)[:, 0])


class Blip(nn.Module):
  """Both encoders."""

  vision: BlipVisionConfig
  text: MedConfig
  dtype: Any
  scan: bool

  def setup(self):
    """Names the parts as the checkpoint does."""
    self.visual_encoder = BlipVision(self.vision, self.dtype, self.scan)
    self.text_encoder = Med(self.text, self.dtype, self.scan)

  def __call__(self, ids: jax.Array, mask: jax.Array, pixels: jax.Array) -> jax.Array:
    """The text's states [B, L, D] with the image in view; arguments as in `ImageRewardNet`."""
    return self.text_encoder(ids, mask, self.visual_encoder(pixels))


class BlipVision(nn.Module):
  """Pre-norm vision transformer with a class token."""

  config: BlipVisionConfig
  dtype: Any = jnp.float32
  scan: bool = True

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """Maps normalised images [B, S, S, 3] to the normalised tokens [B, 1 + (S / p)^2, D]."""
    c = self.config
    if pixels.ndim != 4 or pixels.shape[1:] != (c.image_size, c.image_size, 3):
      raise ValueError(
        f"pixels are {pixels.shape}, expected [B, {c.image_size}, {c.image_size}, 3]"
      )
    patches = PatchEmbed(c, self.dtype, name="patch_embed")(pixels)
    init = nn.initializers.normal(0.02)
    start = self.param("cls_token", init, (1, 1, c.hidden_size)).astype(self.dtype)
    x = jnp.concatenate([jnp.repeat(start, pixels.shape[0], axis=0), patches], axis=1)
    x += self.param("pos_embed", init, (1, *x.shape[1:])).astype(self.dtype)
    stack = stack_blocks(BlipBlock, c.num_hidden_layers, scan=self.scan, remat="none")
    x, _ = stack(c, self.dtype, name="blocks")(x)
    return _norm(self.dtype, "norm")(x)


class PatchEmbed(nn.Module):
  """Linear map of patches."""

  config: BlipVisionConfig
  dtype: Any

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """Maps [B, S, S, 3] to [B, (S / p)^2, D]."""
    c = self.config
    window = (c.patch_size, c.patch_size)
    settings = dict(strides=window, padding=0, dtype=self.dtype, conv_general_dilated=convolve)
    conv = nn.Conv(c.hidden_size, window, **settings, name="proj")
    return conv(pixels).reshape(pixels.shape[0], -1, c.hidden_size)


class BlipBlock(nn.Module):
  """Self-attention and feed-forward, each after its norm."""

  config: BlipVisionConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
    """Maps x [B, N, D] to (x after the block, None)."""
    heads = self.config.num_attention_heads
    x += BlipAttention(heads, self.dtype, name="attn")(_norm(self.dtype, "norm1")(x))
    return x + BlipFeedForward(self.dtype, name="mlp")(_norm(self.dtype, "norm2")(x)), None


class BlipAttention(nn.Module):
  """Self-attention with one projection for queries, keys and values."""

  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, N, D] to the same shape."""
    width = x.shape[-1]
    qkv = Dense(3 * width, dtype=self.dtype, name="qkv")(x)
    q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, self.heads, -1), 2, 0)
    return Dense(width, dtype=self.dtype, name="proj")(attention(q, k, v).reshape(x.shape))


class BlipFeedForward(nn.Module):
  """Dense to four times the width, GELU, dense."""

  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, N, D] to the same shape."""
    width = x.shape[-1]
    y = jax.nn.gelu(Dense(4 * width, dtype=self.dtype, name="fc1")(x), approximate=False)
    return Dense(width, dtype=self.dtype, name="fc2")(y)


def _norm(dtype: Any, name: str) -> nn.LayerNorm:
  return nn.LayerNorm(1e-6, dtype=dtype, use_fast_variance=False, name=name)
