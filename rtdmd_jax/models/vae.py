"""The convolutional autoencoder of SD3 and FLUX.1 (diffusers' `AutoencoderKL`).

Parameters have diffusers' names, with `_0` where a checkpoint key has `.0`. The residual blocks of
a level that keep its width are one stacked subtree `resnets`; the decoder's first level begins with
the mid block's last one, so that XLA compiles it once. Channel-last.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.attention import attention
from rtdmd_jax.models.convolution import convolve
from rtdmd_jax.models.layers import Dense
from rtdmd_jax.models.stack import remat_block, stack_blocks
from rtdmd_jax.models.transformer import config_values
from rtdmd_jax.weights.key_table import KeyTable, Stack

CLASS_NAME = "AutoencoderKL"
# Fields of config.json that say nothing about the computation here.
_IGNORED = {"sample_size", "force_upcast", "latents_mean", "latents_std"}


@dataclass(frozen=True)
class VAEConfig:
  """Fields of diffusers' config.json, with diffusers' defaults."""

  in_channels: int = 3
  out_channels: int = 3
  down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
  up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
  block_out_channels: tuple[int, ...] = (64,)
  layers_per_block: int = 1
  act_fn: str = "silu"
  latent_channels: int = 4
  norm_num_groups: int = 32
  scaling_factor: float = 0.18215
  shift_factor: float | None = None
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  mid_block_add_attention: bool = True

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "VAEConfig":
    """Reads a config.json; keys with a leading underscore are diffusers' own notes.

    Raises:
      UserError: another class name, an unknown key, or a block type or activation not supported.
    """
    return read_vae_config(cls, CLASS_NAME, config)

  @property
  def factor(self) -> int:
    """Image side divided by latent side."""
    return 2 ** (len(self.block_out_channels) - 1)


def read_vae_config(cls: type, class_name: str, config: Mapping[str, Any]) -> Any:
  """Reads a config.json into a dataclass with the fields of `VAEConfig` that the blocks need."""
  config = {k: v for k, v in config.items() if k not in _IGNORED}
  built = cls(**config_values(cls, class_name, config))
  supported = {"DownEncoderBlock2D", "UpDecoderBlock2D"}
  strange = sorted({*built.down_block_types, *built.up_block_types} - supported)
  if strange or built.act_fn != "silu":
    what = strange[0] if strange else built.act_fn
    raise UserError(f"{class_name} config asks for {what!r}, which is not supported.")
  return built


class AutoencoderKL(nn.Module):
  """Images in [-1, 1] to the moments of a diagonal Gaussian over latents, and back.

  Attributes:
    config: of the checkpoint.
    dtype: of the computation.
    remat: what a backward pass through the decoder recomputes of each block (`models/stack.py`).
  """

  config: VAEConfig
  dtype: Any = jnp.float32
  remat: str = "none"

  def setup(self):
    """Names the parts as the checkpoint does."""
    c = self.config
    self.encoder = Encoder(c, self.dtype)
    self.decoder = Decoder(self.decoder_config(), self.dtype, self.remat)
    if c.use_quant_conv:
      self.quant_conv = _conv(2 * c.latent_channels, 1, self.dtype)
    if c.use_post_quant_conv:
      self.post_quant_conv = _conv(c.latent_channels, 1, self.dtype)

  def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maps images [B, H, W, 3] to (mean, log-variance, reconstruction from the mean)."""
    mean, log_variance = self.encode(images)
    return mean, log_variance, self.decode(mean)

  def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maps images [B, H, W, 3] in [-1, 1] to (mean, log-variance), each [B, h, w, C] float32."""
    h = self.encoder(images.astype(self.dtype))
    if self.config.use_quant_conv:
      h = self.quant_conv(h)
    mean, log_variance = jnp.split(h.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(log_variance, -30.0, 20.0)

  def decode(self, z: jax.Array) -> jax.Array:
    """Maps unscaled latents [B, h, w, C] to images [B, H, W, 3] float32, about [-1, 1]."""
    z = z.astype(self.dtype)
    if self.config.use_post_quant_conv:
      z = self.post_quant_conv(z)
    return self.decoder(z).astype(jnp.float32)

  def decoder_config(self) -> Any:
    """The config that the decoder reads."""
    return self.config

  @property
  def table(self) -> KeyTable:
    """Maps the parameters to diffusers' checkpoint keys."""
    down, up = self.config.block_out_channels, self.decoder_config().block_out_channels[::-1]
    # The first block of a level that changes the width stands before the stack.
    stacks = [
      Stack(f"{levels}_{i}.resnets", f"{levels}.{i}.resnets", int(width != widths[max(i - 1, 0)]))
      for levels, widths in (("encoder.down_blocks", down), ("decoder.up_blocks", up))
      for i, width in enumerate(widths)
    ]
    # The mid block's last one, before block 0 of the decoder's first level.
    stacks[len(down)] = Stack("decoder.up_blocks_0.resnets", "decoder.up_blocks.0.resnets", -1)
    joined = (r"^decoder\.up_blocks\.0\.resnets\.-1", "decoder.mid_block.resnets.1")
    return KeyTable(stacks=stacks, renames=[(r"_(\d+)(?=\.|$)", r".\1"), joined])

  def to_latents(self, z: jax.Array) -> jax.Array:
    """Maps z [B, h, w, C] to the transformer's latents; see `scale_latents`."""
    return scale_latents(z, self.config)

  def decode_latents(self, latents: jax.Array) -> jax.Array:
    """Maps the transformer's latents to images [B, H, W, 3] float32, about [-1, 1]."""
    c = self.config
    return self.decode(latents / c.scaling_factor + (c.shift_factor or 0.0))


def scale_latents(z: jax.Array, config: VAEConfig) -> jax.Array:
  """The autoencoder's latents as the transformer sees them: `(z - shift) * scale`."""
  return (z - (config.shift_factor or 0.0)) * config.scaling_factor


def decode_images(
  vae: AutoencoderKL, params: Any, latents: jax.Array, *, clamp: bool = True
) -> jax.Array:
  """Decodes the transformer's latents [B, h, w, C] to images [B, H, W, 3], black 0 and white 1.

  Args:
    vae: the autoencoder.
    params: its parameters.
    latents: as `encode_images` gives them.
    clamp: keep values in [0, 1]; a clamped value has no gradient.
  """
  images = 0.5 * vae.apply({"params": params}, latents, method="decode_latents") + 0.5
  return jnp.clip(images, 0.0, 1.0) if clamp else images


def encode_images(
  vae: AutoencoderKL, params: Any, images: jax.Array, *, noise: jax.Array | None = None
) -> jax.Array:
  """Encodes images [B, H, W, 3] in [0, 1] to the transformer's latents [B, h, w, C].

  Args:
    vae: the autoencoder.
    params: its parameters.
    images: sides divisible by `vae.config.factor`.
    noise: standard normal in the shape of z, for a sample of the posterior; None takes its mean.
  """
  z, log_variance = vae.apply({"params": params}, 2.0 * images - 1.0, method="encode")
  if noise is not None:
    z += jnp.exp(0.5 * log_variance) * noise
  return vae.apply({"params": params}, z, method="to_latents")


def _conv(features: int, size: int, dtype: Any, **kwargs) -> nn.Conv:
  kwargs.setdefault("padding", size // 2)
  return nn.Conv(features, (size, size), dtype=dtype, conv_general_dilated=convolve, **kwargs)


class Encoder(nn.Module):
  """Convolution, one down block a resolution, mid block, convolution to moments."""

  config: VAEConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, H, W, 3] to [B, h, w, 2 C]."""
    c = self.config
    x = _conv(c.block_out_channels[0], 3, self.dtype, name="conv_in")(x)
    last = len(c.block_out_channels) - 1
    for i, width in enumerate(c.block_out_channels):
      step = "down" if i < last else None
      x = Level(width, c.layers_per_block, step, c, self.dtype, name=f"down_blocks_{i}")(x)
    x = MidBlock(c, self.dtype, name="mid_block")(x)
    x = nn.silu(_norm(c, self.dtype, "conv_norm_out")(x))
    return _conv(2 * c.latent_channels, 3, self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
  """Convolution, mid block, one up block a resolution, convolution to pixels."""

  config: VAEConfig
  dtype: Any
  remat: str = "none"

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    """Maps [B, h, w, C] to [B, H, W, 3]."""
    c = self.config
    widths = c.block_out_channels[::-1]
    settings = c, self.dtype, self.remat
    x = _conv(widths[0], 3, self.dtype, name="conv_in")(z)
    x = MidBlock(*settings, last=False, name="mid_block")(x)
    last = len(widths) - 1
    for i, width in enumerate(widths):
      step, layers = "up" if i < last else None, c.layers_per_block + 1 + (i == 0)
      x = Level(width, layers, step, *settings, name=f"up_blocks_{i}")(x)
    x = nn.silu(_norm(c, self.dtype, "conv_norm_out")(x))
    return _conv(c.out_channels, 3, self.dtype, name="conv_out")(x)


def _norm(config: VAEConfig, dtype: Any, name: str) -> nn.GroupNorm:
  # Two passes over the data: the fast variance cancels badly in float32.
  return nn.GroupNorm(
    config.norm_num_groups, epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name
  )


class ResnetBlock(nn.Module):
  """Two normalised convolutions beside a shortcut."""

  features: int
  config: VAEConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
    """Maps [B, H, W, C_in] to ([B, H, W, features], None)."""
    h = nn.silu(_norm(self.config, self.dtype, "norm1")(x))
    h = _conv(self.features, 3, self.dtype, name="conv1")(h)
    h = nn.silu(_norm(self.config, self.dtype, "norm2")(h))
    h = _conv(self.features, 3, self.dtype, name="conv2")(h)
    if x.shape[-1] != self.features:
      x = _conv(self.features, 1, self.dtype, name="conv_shortcut")(x)
    return x + h, None


class Level(nn.Module):
  """Residual blocks at one resolution, then the step to the next: "down", "up" or None."""

  features: int
  layers: int
  step: str | None
  config: VAEConfig
  dtype: Any
  remat: str = "none"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, H, W, C_in] to `features` channels at half, twice or the same resolution."""
    settings, equal = (self.features, self.config, self.dtype), self.layers
    if x.shape[-1] != self.features:
      x, _ = remat_block(ResnetBlock, self.remat)(*settings, name="resnets_0")(x)
      equal -= 1
    if equal:
      stack = stack_blocks(ResnetBlock, equal, scan=True, remat=self.remat)
      x, _ = stack(*settings, name="resnets")(x)
    if self.step is None:
      return x
    name = f"{self.step}samplers_0"
    return Resample(self.features, self.step == "down", self.dtype, name=name)(x)


class Resample(nn.Module):
  """A strided convolution down, or nearest-neighbour doubling and a convolution up."""

  features: int
  down: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, H, W, C] to half or twice the resolution."""
    if self.down:
      # Padding at the far edges only, as published.
      padding = ((0, 1), (0, 1))
      return _conv(self.features, 3, self.dtype, strides=2, padding=padding, name="conv")(x)
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return _conv(self.features, 3, self.dtype, name="conv")(x)


class MidBlock(nn.Module):
  """Residual block, attention over all positions, residual block if it has the `last` one."""

  config: VAEConfig
  dtype: Any
  remat: str = "none"
  last: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, h, w, C] to the same shape."""
    settings, block = (x.shape[-1], self.config, self.dtype), remat_block(ResnetBlock, self.remat)
    x, _ = block(*settings, name="resnets_0")(x)
    if self.config.mid_block_add_attention:
      attend = remat_block(MidAttention, self.remat)
      x = attend(self.config, self.dtype, name="attentions_0")(x)
    return block(*settings, name="resnets_1")(x)[0] if self.last else x


class MidAttention(nn.Module):
  """Single-head self-attention over all positions, with a residual."""

  config: VAEConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, h, w, C] to the same shape."""
    b, h, w, features = x.shape
    y = _norm(self.config, self.dtype, "group_norm")(x).reshape(b, h * w, features)
    q, k, v = (
      Dense(features, dtype=self.dtype, name=name)(y)[:, :, None]
      for name in ("to_q", "to_k", "to_v")
    )
    y = Dense(features, dtype=self.dtype, name="to_out_0")(attention(q, k, v)[:, :, 0])
    return x + y.reshape(x.shape)
