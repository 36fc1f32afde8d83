"""The transformer of FLUX.1: double stream, then single stream blocks (arXiv 2506.15742, sec. 2).

Parameters have the names of diffusers' `FluxTransformer2DModel`, with `_0` where a checkpoint key
has `.0`; both runs of blocks are stacked subtrees under the checkpoint's own names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.embeddings import timestep_embedding
from rtdmd_jax.models.flux_layers import (
  JointAttention,
  Streams,
  check_config,
  grid_positions,
  project_heads,
  rotary_attention,
)
from rtdmd_jax.models.layers import Dense
from rtdmd_jax.models.norms import layer_norm
from rtdmd_jax.models.packing import pack, unpack
from rtdmd_jax.models.rotary import Rotary, rotary_table
from rtdmd_jax.models.sd3 import FeedForward, Modulation, Perceptron, modulate
from rtdmd_jax.models.stack import stack_blocks
from rtdmd_jax.models.transformer import Transformer, config_values
from rtdmd_jax.weights.maps import KeyTable, Stack

CLASS_NAME = "FluxTransformer2DModel"
TABLE = KeyTable(
  stacks=[Stack(name, name) for name in ("transformer_blocks", "single_transformer_blocks")],
  renames=[
    (r"\bto_out_0$", "to_out.0"),
    (r"\bnet_0_proj$", "net.0.proj"),
    (r"\bnet_2$", "net.2"),
  ],
)
_THETA = 10000.0
_EPS = 1e-6


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
    values = config_values(cls, CLASS_NAME, config)
    if "axes_dims_rope" in values:
      values["axes_dims_rope"] = tuple(values["axes_dims_rope"])
    built = cls(**values)
    check_config(built)
    if len(built.axes_dims_rope) != 3:
      raise UserError(f"axes_dims_rope is {list(built.axes_dims_rope)}, expected 3 numbers.")
    if built.in_channels % 4:
      raise UserError(f"in_channels is {built.in_channels}, expected 4 latent pixels' channels.")
    return built


def build(config: Mapping[str, Any], *, dtype: Any, scan: bool, remat: str) -> Transformer:
  """Builds the transformer of a config.json; see `models.build_transformer`."""
  c = Flux1Config.from_dict(config)
  shapes = (
    (1, 2, 2, c.in_channels // 4),
    (1,),
    (1, 1, c.joint_attention_dim),
    (1, c.pooled_projection_dim),
  )
  example = tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
  guidance = jax.ShapeDtypeStruct((1,), jnp.float32) if c.guidance_embeds else None
  return Transformer(c, Flux1(c, dtype, scan, remat), TABLE, (*example, guidance))


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
    scale, shift = Modulation(2, self.dtype, name="norm_out")(temb)
    x = modulate(layer_norm(x[:, length:]), shift, scale)
    x = Dense(channels, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="proj_out")(x)
    return unpack(x.reshape(b, h, w, channels)).astype(jnp.float32)


def positions(length: int, height: int, width: int) -> np.ndarray:
  """Three coordinates a token, [length + height * width, 3]: text at the origin, then the grid."""
  rows, columns = grid_positions(height, width)
  image = np.stack([np.zeros_like(rows), rows, columns], axis=-1)
  return np.concatenate([np.zeros((length, 3), image.dtype), image])


class TimeTextEmbed(nn.Module):
  """Sum of the embedded time, the embedded guidance scale if any, and the embedded pooled text."""

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, sigma: jax.Array, pooled: jax.Array, guidance: jax.Array | None) -> jax.Array:
    """Maps sigma [B], pooled [B, P] and guidance [B] to [B, features]."""
    # Both scalars stay float32 up to their sinusoids; published pipelines round them to bfloat16.
    scalars = {"timestep_embedder": sigma, "guidance_embedder": guidance}
    out = Perceptron(self.features, self.dtype, name="text_embedder")(pooled)
    for name, value in scalars.items():
      if value is not None:
        embedded = timestep_embedding(1000.0 * value.astype(jnp.float32))
        out += Perceptron(self.features, self.dtype, name=name)(embedded)
    return out


class DoubleBlock(nn.Module):
  """Joint attention, then a feed-forward network each for text and image."""

  config: Flux1Config
  dtype: Any

  @nn.compact
  def __call__(self, carry: Streams, temb: jax.Array, rotary: Rotary) -> tuple[Streams, None]:
    """Maps (text [B, L, D], image [B, N, D]) to the same, given activated temb [B, D]."""
    context, x = carry
    parts = Modulation(6, self.dtype, name="norm1")(temb)
    text_parts = Modulation(6, self.dtype, name="norm1_context")(temb)
    attend = JointAttention(self.config.num_attention_heads, True, _EPS, self.dtype, name="attn")
    text_attended, attended = attend(
      modulate(layer_norm(context), *text_parts[:2]), modulate(layer_norm(x), *parts[:2]), rotary
    )
    x = self._feed_forward("ff", x + parts[2] * attended, *parts[3:])
    context = context + text_parts[2] * text_attended
    return (self._feed_forward("ff_context", context, *text_parts[3:]), x), None

  def _feed_forward(
    self, name: str, x: jax.Array, shift: jax.Array, scale: jax.Array, gate: jax.Array
  ) -> jax.Array:
    return x + gate * FeedForward(self.dtype, name=name)(modulate(layer_norm(x), shift, scale))


class SingleBlock(nn.Module):
  """Attention and feed-forward side by side, over text and image as one sequence."""

  config: Flux1Config
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, temb: jax.Array, rotary: Rotary) -> tuple[jax.Array, None]:
    """Maps x [B, L + N, D] to the same, given activated temb [B, D]."""
    width = x.shape[-1]
    shift, scale, gate = Modulation(3, self.dtype, name="norm")(temb)
    y = modulate(layer_norm(x), shift, scale)
    attended = SelfAttention(self.config.num_attention_heads, self.dtype, name="attn")(y, rotary)
    hidden = nn.gelu(Dense(4 * width, dtype=self.dtype, name="proj_mlp")(y), approximate=True)
    y = jnp.concatenate([attended, hidden], axis=-1)
    return x + gate * Dense(width, dtype=self.dtype, name="proj_out")(y), None


class SelfAttention(nn.Module):
  """Attention without an output projection, which the block shares with its feed-forward."""

  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, rotary: Rotary) -> jax.Array:
    """Maps [B, L, D] to the same shape."""
    names, norms = ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")
    q, k, v = project_heads(
      x, names, norms, heads=self.heads, use_bias=True, eps=_EPS, dtype=self.dtype
    )
    return rotary_attention(q, k, v, rotary)
