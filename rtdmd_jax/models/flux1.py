"""The transformer of FLUX.1: double stream, then single stream blocks (arXiv 2506.15742, sec. 2).

Parameters have the names of diffusers' `FluxTransformer2DModel`, with `_0` where a checkpoint key
has `.0`; both runs of blocks are stacked subtrees under the checkpoint's own names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.models import first_release
from rtdmd_jax.models.first_release import DOUBLE, SINGLE
from rtdmd_jax.models.flux_layers import (
  TABLE,
  JointAttention,
  Streams,
  check_config,
  grid_positions,
  joint_block,
  rotary_attention,
)
from rtdmd_jax.models.layers import Dense
from rtdmd_jax.models.mmdit_layers import (
  FeedForward,
  Modulation,
  TimeTextEmbed,
  branch,
  project_heads,
  project_out,
)
from rtdmd_jax.models.packing import pack, unpack
from rtdmd_jax.models.rotary import Rotary, rotary_table
from rtdmd_jax.models.stack import stack_blocks
from rtdmd_jax.models.transformer import OtherNames, Transformer, config_values, example_inputs

CLASS_NAME = "FluxTransformer2DModel"
_THETA = 10000.0
_EPS = 1e-6


_FIRST_RELEASE = (
  *first_release.ATTENTION,
  (rf"{DOUBLE}ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0"),
  (rf"{DOUBLE}ff\.net\.2", r"double_blocks.\1.img_mlp.2"),
  (rf"{DOUBLE}ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0"),
  (rf"{DOUBLE}ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2"),
  (rf"{DOUBLE}norm1\.linear", r"double_blocks.\1.img_mod.lin"),
  (rf"{DOUBLE}norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
  *((rf"{SINGLE}attn\.to_{c}", rf"single_blocks.\1.linear1#{i}") for i, c in enumerate("qkv")),
  (rf"{SINGLE}proj_mlp", r"single_blocks.\1.linear1#3"),
  (rf"{SINGLE}proj_out", r"single_blocks.\1.linear2"),
  (rf"{SINGLE}norm\.linear", r"single_blocks.\1.modulation.lin"),
  *first_release.EMBEDDERS,
)
# XLabs' names of first-release layers; 1 is the image, 2 the text.
_XLABS = (
  (r"(double_blocks\.\d+)\.img_attn\.(qkv|proj)", r"\1.processor.\2_lora1"),
  (r"(double_blocks\.\d+)\.txt_attn\.(qkv|proj)", r"\1.processor.\2_lora2"),
  (r"(single_blocks\.\d+)\.linear1", r"\1.processor.qkv_lora"),
  (r"(single_blocks\.\d+)\.linear2", r"\1.processor.proj_lora"),
)
NAMES = OtherNames("FluxPipeline", CLASS_NAME, _FIRST_RELEASE, of_first_release=_XLABS)


@dataclass(frozen=True)
class Flux1Config:
  """Fields of diffusers' config.json, with diffusers' defaults."""

  patch_size: int = 1
  in_channels: int = 64
  out_channels: int | None = None
  num_layers: int = 19
  num_single_layers: int = 38
  attention_head_dim: int = 128
  num_attention_heads: int = 24
  joint_attention_dim: int = 4096
  pooled_projection_dim: int = 768
  guidance_embeds: bool = False
  axes_dims_rope: tuple[int, ...] = (16, 56, 56)

  @property
  def width(self) -> int:
    """Features of the residual streams."""
    return self.num_attention_heads * self.attention_head_dim

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "Flux1Config":
    """Reads a config.json.

    Raises:
      UserError: another class name, an unknown key, or values that do not fit together.
    """
    built = cls(**config_values(cls, CLASS_NAME, config))
    check_config(built, axes=3)
    if built.in_channels % 4:
      raise UserError(f"in_channels is {built.in_channels}, expected 4 latent pixels' channels.")
    return built


def build(config: Mapping[str, Any], *, dtype: Any, scan: bool, remat: str) -> Transformer:
  """Builds the transformer of a config.json; see `models.build_transformer`."""
  c = Flux1Config.from_dict(config)
  example = example_inputs(
    (2, 2, c.in_channels // 4),
    c.joint_attention_dim,
    c.pooled_projection_dim,
    guidance=c.guidance_embeds,
  )
  return Transformer(c, Flux1(c, dtype, scan, remat), TABLE, example, names=NAMES)


class Flux1(nn.Module):
  """Velocity of FLUX.1; takes latents as the autoencoder gives them and packs them 2 x 2."""

  config: Flux1Config
  dtype: Any = jnp.float32
  scan: bool = True
  remat: str = "none"

  @nn.compact
  def __call__(
    self,
    latents: jax.Array,
    sigma: jax.Array,
    tokens: jax.Array,
    pooled: jax.Array | None = None,
    guidance: jax.Array | None = None,
  ) -> jax.Array:
    """Predicts noise minus data.

    Args:
      latents: [B, H, W, C], H and W even, C a quarter of the config's `in_channels`.
      sigma: [B], noise level in [0, 1]; the network's time is 1000 sigma.
      tokens: [B, L, D] text embeddings.
      pooled: [B, P] pooled text embeddings, required.
      guidance: [B] guidance scale, required exactly where the config embeds it.

    Returns:
      [B, H, W, C] float32.
    """
    c = self.config
    if pooled is None or (guidance is not None) != c.guidance_embeds:
      raise ValueError(
        "FLUX.1 needs pooled text embeddings, and guidance exactly if guidance_embeds is set"
        f" (here {c.guidance_embeds})"
      )
    if latents.shape[-1] * 4 != c.in_channels:
      raise ValueError(f"latents have {latents.shape[-1]} channels, expected {c.in_channels // 4}")
    packed = pack(latents)
    b, h, w, channels = packed.shape
    x = Dense(c.width, dtype=self.dtype, name="x_embedder")(packed.reshape(b, h * w, channels))
    embed = TimeTextEmbed(c.width, self.dtype, name="time_text_embed")
    # Every adaptive norm starts with the same SiLU: once is enough.
    temb = nn.silu(embed(sigma, pooled, guidance))
    context = Dense(c.width, dtype=self.dtype, name="context_embedder")(tokens)
    length = tokens.shape[1]
    rotary = rotary_table(positions(length, h, w), c.axes_dims_rope, _THETA)
    double = stack_blocks(DoubleBlock, c.num_layers, scan=self.scan, remat=self.remat)
    streams, _ = double(c, self.dtype, name="transformer_blocks")((context, x), temb, rotary)
    single = stack_blocks(SingleBlock, c.num_single_layers, scan=self.scan, remat=self.remat)
    single = single(c, self.dtype, name="single_transformer_blocks")
    x, _ = single(jnp.concatenate(streams, axis=1), temb, rotary)
    x = project_out(x[:, length:], temb, channels, dtype=self.dtype)
    return unpack(x.reshape(b, h, w, channels)).astype(jnp.float32)


def positions(length: int, height: int, width: int) -> np.ndarray:
  """Three coordinates a token, [length + height * width, 3]: text at the origin, then the grid."""
  rows, columns = grid_positions(height, width)
  image = np.stack([np.zeros_like(rows), rows, columns], axis=-1)
  return np.concatenate([np.zeros((length, 3), image.dtype), image])


class DoubleBlock(nn.Module):
  """Joint attention, then a feed-forward network each for text and image."""

  config: Flux1Config
  dtype: Any

  @nn.compact
  def __call__(self, carry: Streams, temb: jax.Array, rotary: Rotary) -> tuple[Streams, None]:
    """Maps (text [B, L, D], image [B, N, D]) to the same, given activated temb [B, D]."""
    image = Modulation(6, self.dtype, name="norm1")(temb)
    text = Modulation(6, self.dtype, name="norm1_context")(temb)
    attend = JointAttention(self.config.num_attention_heads, True, _EPS, self.dtype, name="attn")
    make = partial(FeedForward, self.dtype)
    out = joint_block(carry, text, image, rotary, attend=attend, feed_forward=make, eps=_EPS)
    return out, None


class SingleBlock(nn.Module):
  """Attention and feed-forward side by side, over text and image as one sequence."""

  config: Flux1Config
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, temb: jax.Array, rotary: Rotary) -> tuple[jax.Array, None]:
    """Maps x [B, L + N, D] to the same, given activated temb [B, D]."""
    parts = Modulation(3, self.dtype, name="norm")(temb)
    return branch(x, lambda y: self._layer(y, rotary), *parts), None

  def _layer(self, y: jax.Array, rotary: Rotary) -> jax.Array:
    width = y.shape[-1]
    attended = SelfAttention(self.config.num_attention_heads, self.dtype, name="attn")(y, rotary)
    hidden = nn.gelu(Dense(4 * width, dtype=self.dtype, name="proj_mlp")(y), approximate=True)
    y = jnp.concatenate([attended, hidden], axis=-1)
    return Dense(width, dtype=self.dtype, name="proj_out")(y)


class SelfAttention(nn.Module):
  """Attention without an output projection, which the block shares with its feed-forward."""

  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, rotary: Rotary) -> jax.Array:
    """Maps [B, L, D] to the same shape."""
    names, norms = ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")
    q, k, v = project_heads(x, names, norms, heads=self.heads, eps=_EPS, dtype=self.dtype)
    return rotary_attention(q, k, v, rotary)
