"""The transformer of FLUX.2: all blocks of a kind share one modulation of the time.

Parameters have the names of diffusers' `Flux2Transformer2DModel`, with `_0` where a checkpoint key
has `.0`; both runs of blocks are stacked subtrees under the checkpoint's own names. Single stream
blocks compute attention and feed-forward from one fused projection (ViT-22B, arXiv 2302.05442).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

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
from rtdmd_jax.models.heads import split_heads
from rtdmd_jax.models.layers import Dense
from rtdmd_jax.models.mmdit_layers import Modulation, TimeTextEmbed, branch, project_out
from rtdmd_jax.models.norms import RMSNorm
from rtdmd_jax.models.rotary import Rotary, rotary_table
from rtdmd_jax.models.stack import stack_blocks
from rtdmd_jax.models.transformer import OtherNames, Transformer, config_values, example_inputs

CLASS_NAME = "Flux2Transformer2DModel"


_FIRST_RELEASE = (
  *first_release.ATTENTION,
  (rf"{DOUBLE}ff\.linear_in", r"double_blocks.\1.img_mlp.0"),
  (rf"{DOUBLE}ff\.linear_out", r"double_blocks.\1.img_mlp.2"),
  (rf"{DOUBLE}ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0"),
  (rf"{DOUBLE}ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2"),
  (rf"{SINGLE}attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
  (rf"{SINGLE}attn\.to_out", r"single_blocks.\1.linear2"),
  (r"(double_stream_modulation_(?:img|txt)|single_stream_modulation)\.linear", r"\1.lin"),
  *first_release.EMBEDDERS,
)
# Some exports lost the start of `transformer_blocks`; diffusers reads them, too.
_SHORTENED = ((r"tran(sformer_blocks\..+)", r"\1"),)
NAMES = OtherNames("Flux2KleinPipeline", CLASS_NAME, _FIRST_RELEASE, of_diffusers=_SHORTENED)


@dataclass(frozen=True)
class Flux2Config:
  """Fields of diffusers' config.json, with diffusers' defaults."""

  patch_size: int = 1
  in_channels: int = 128
  out_channels: int | None = None
  num_layers: int = 8
  num_single_layers: int = 48
  attention_head_dim: int = 128
  num_attention_heads: int = 48
  joint_attention_dim: int = 15360
  timestep_guidance_channels: int = 256
  mlp_ratio: float = 3.0
  axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
  rope_theta: int = 2000
  eps: float = 1e-6
  guidance_embeds: bool = True

  @property
  def width(self) -> int:
    """Features of the residual streams."""
    return self.num_attention_heads * self.attention_head_dim

  @property
  def hidden(self) -> int:
    """Features inside the feed-forward networks."""
    return int(self.width * self.mlp_ratio)

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "Flux2Config":
    """Reads a config.json.

    Raises:
      UserError: another class name, an unknown key, or values that do not fit together.
    """
    built = cls(**config_values(cls, CLASS_NAME, config))
    check_config(built, axes=4)
    return built


def build(config: Mapping[str, Any], *, dtype: Any, scan: bool, remat: str) -> Transformer:
  """Builds the transformer of a config.json; see `models.build_transformer`."""
  c = Flux2Config.from_dict(config)
  example = example_inputs((1, 1, c.in_channels), c.joint_attention_dim, guidance=c.guidance_embeds)
  return Transformer(c, Flux2(c, dtype, scan, remat), TABLE, example, names=NAMES)


class Flux2(nn.Module):
  """Velocity of FLUX.2; its latents are already packed 2 x 2 by the autoencoder."""

  config: Flux2Config
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
      latents: [B, H, W, C].
      sigma: [B], noise level in [0, 1]; the network's time is 1000 sigma.
      tokens: [B, L, D] text embeddings.
      pooled: must be None, FLUX.2 has no such input.
      guidance: [B] guidance scale, required exactly where the config embeds it (not in klein).

    Returns:
      [B, H, W, C] float32.
    """
    c = self.config
    if pooled is not None or (guidance is not None) != c.guidance_embeds:
      raise ValueError(
        "FLUX.2 takes no pooled text embeddings, and guidance exactly if guidance_embeds is set"
        f" (here {c.guidance_embeds})"
      )
    b, h, w, channels = latents.shape
    if channels != c.in_channels:
      raise ValueError(f"latents have {channels} channels, expected {c.in_channels}")
    sinusoids = c.timestep_guidance_channels
    embed = TimeTextEmbed(c.width, self.dtype, False, sinusoids, name="time_guidance_embed")
    temb = nn.silu(embed(sigma, guidance=guidance))
    image = self._modulation(6, "double_stream_modulation_img")(temb)
    text = self._modulation(6, "double_stream_modulation_txt")(temb)
    joint = self._modulation(3, "single_stream_modulation")(temb)
    x = _dense(c.width, self.dtype, "x_embedder")(latents.reshape(b, h * w, channels))
    context = _dense(c.width, self.dtype, "context_embedder")(tokens)
    length = tokens.shape[1]
    rotary = rotary_table(positions(length, h, w), c.axes_dims_rope, c.rope_theta)
    double = stack_blocks(DoubleBlock, c.num_layers, scan=self.scan, remat=self.remat)
    double = double(c, self.dtype, name="transformer_blocks")
    streams, _ = double((context, x), text, image, rotary)
    single = stack_blocks(SingleBlock, c.num_single_layers, scan=self.scan, remat=self.remat)
    single = single(c, self.dtype, name="single_transformer_blocks")
    x, _ = single(jnp.concatenate(streams, axis=1), joint, rotary)
    options = {"dtype": self.dtype, "use_bias": False, "eps": c.eps}
    x = project_out(x[:, length:], temb, channels, **options)
    return x.reshape(b, h, w, channels).astype(jnp.float32)

  def _modulation(self, parts: int, name: str) -> Modulation:
    return Modulation(parts, self.dtype, use_bias=False, name=name)


def positions(length: int, height: int, width: int) -> np.ndarray:
  """Time, row, column and index in the text of each token, [length + height * width, 4]."""
  rows, columns = grid_positions(height, width)
  image = np.stack([np.zeros_like(rows), rows, columns, np.zeros_like(rows)], axis=-1)
  text = np.zeros((length, 4), image.dtype)
  text[:, 3] = np.arange(length)
  return np.concatenate([text, image])


def _dense(features: int, dtype: Any, name: str) -> Dense:
  return Dense(features, use_bias=False, dtype=dtype, name=name)


class DoubleBlock(nn.Module):
  """Joint attention, then a feed-forward network each for text and image."""

  config: Flux2Config
  dtype: Any

  @nn.compact
  def __call__(
    self,
    carry: Streams,
    text: Sequence[jax.Array],
    image: Sequence[jax.Array],
    rotary: Rotary,
  ) -> tuple[Streams, None]:
    """Maps (text [B, L, D], image [B, N, D]) to the same, given six modulations each, [B, 1, D]."""
    c = self.config
    attend = JointAttention(c.num_attention_heads, False, c.eps, self.dtype, name="attn")
    make = partial(FeedForward, c.hidden, self.dtype)
    out = joint_block(carry, text, image, rotary, attend=attend, feed_forward=make, eps=c.eps)
    return out, None


class FeedForward(nn.Module):
  """SwiGLU (arXiv 2002.05202) with gate and value from one projection."""

  hidden: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, L, D] to [B, L, D]."""
    y = swiglu(_dense(2 * self.hidden, self.dtype, "linear_in")(x))
    return _dense(x.shape[-1], self.dtype, "linear_out")(y)


def swiglu(x: jax.Array) -> jax.Array:
  """`silu(gate) * value` of the two halves of [..., 2 D]."""
  gate, value = jnp.split(x, 2, axis=-1)
  return nn.silu(gate) * value


class SingleBlock(nn.Module):
  """Attention and feed-forward side by side, over text and image as one sequence."""

  config: Flux2Config
  dtype: Any

  @nn.compact
  def __call__(
    self, x: jax.Array, modulation: Sequence[jax.Array], rotary: Rotary
  ) -> tuple[jax.Array, None]:
    """Maps x [B, L + N, D] to the same, given three modulations [B, 1, D]."""
    attend = ParallelAttention(self.config, self.dtype, name="attn")
    return branch(x, lambda y: attend(y, rotary), *modulation, eps=self.config.eps), None


class ParallelAttention(nn.Module):
  """Attention and SwiGLU between one fused projection in and one out."""

  config: Flux2Config
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, rotary: Rotary) -> jax.Array:
    """Maps [B, L, D] to the same shape."""
    c = self.config
    fused = _dense(3 * c.width + 2 * c.hidden, self.dtype, "to_qkv_mlp_proj")(x)
    q, k, v, mlp = jnp.split(fused, [c.width, 2 * c.width, 3 * c.width], axis=-1)
    q, k, v = (split_heads(y, c.num_attention_heads) for y in (q, k, v))
    q = RMSNorm(c.eps, self.dtype, name="norm_q")(q)
    k = RMSNorm(c.eps, self.dtype, name="norm_k")(k)
    y = jnp.concatenate([rotary_attention(q, k, v, rotary), swiglu(mlp)], axis=-1)
    return _dense(c.width, self.dtype, "to_out")(y)
