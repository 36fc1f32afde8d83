"""The convolutional autoencoder of FLUX.2 (diffusers' `AutoencoderKLFlux2`).

Its blocks are FLUX.1's; instead of a scale and a shift, the transformer's latents are packed 2 x 2
and whitened feature by feature with the running statistics of a batch norm.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.packing import pack, unpack
from rtdmd_jax.models.vae import AutoencoderKL, read_vae_config

CLASS_NAME = "AutoencoderKLFlux2"
# The batch norm's count of its training steps.
IGNORED_KEYS = (r"bn\.num_batches_tracked",)
_LEVELS = 4


@dataclass(frozen=True)
class Flux2VAEConfig:
  """Fields of diffusers' config.json, with diffusers' defaults."""

  in_channels: int = 3
  out_channels: int = 3
  down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * _LEVELS
  up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * _LEVELS
  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  decoder_block_out_channels: tuple[int, ...] | None = None
  layers_per_block: int = 2
  act_fn: str = "silu"
  latent_channels: int = 32
  norm_num_groups: int = 32
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  mid_block_add_attention: bool = True
  batch_norm_eps: float = 1e-4
  batch_norm_momentum: float = 0.1
  patch_size: tuple[int, int] = (2, 2)

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "Flux2VAEConfig":
    """Reads a config.json; keys with a leading underscore are diffusers' own notes.

    Raises:
      UserError: another class name, an unknown key, or a value that is not supported.
    """
    built = read_vae_config(cls, CLASS_NAME, config)
    if built.patch_size != (2, 2):
      raise UserError(f"patch_size is {list(built.patch_size)}, expected [2, 2].")
    return built

  @property
  def factor(self) -> int:
    """Image side divided by the side of the packed latents."""
    return 2 ** len(self.block_out_channels)


class AutoencoderKLFlux2(AutoencoderKL):
  """FLUX.1's autoencoder with packed, whitened latents [B, H / factor, W / factor, 4 C]."""

  config: Flux2VAEConfig

  def setup(self):
    """Adds the statistics."""
    super().setup()
    self.bn = Statistics(self.config.batch_norm_eps)

  def decoder_config(self) -> Flux2VAEConfig:
    """The config with the decoder's widths, which may be its own."""
    widths = self.config.decoder_block_out_channels or self.config.block_out_channels
    return replace(self.config, block_out_channels=widths)

  def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maps images [B, H, W, 3] to (mean, log-variance, reconstruction from the mean)."""
    mean, log_variance = self.encode(images)
    return mean, log_variance, self.decode_latents(self.to_latents(mean))

  def to_latents(self, z: jax.Array) -> jax.Array:
    """Maps z [B, h, w, C] to the transformer's latents [B, h / 2, w / 2, 4 C]."""
    packed = pack(z)
    mean, deviation = self.bn(packed.shape[-1])
    return (packed - mean) / deviation

  def decode_latents(self, latents: jax.Array) -> jax.Array:
    """Maps the transformer's latents to images [B, H, W, 3] float32, about [-1, 1]."""
    mean, deviation = self.bn(latents.shape[-1])
    return self.decode(unpack(latents.astype(jnp.float32) * deviation + mean))


class Statistics(nn.Module):
  """Running mean and variance of a batch norm, as parameters."""

  eps: float

  @nn.compact
  def __call__(self, features: int) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation, each [features] float32."""
    mean = self.param("running_mean", nn.initializers.zeros, (features,))
    variance = self.param("running_var", nn.initializers.ones, (features,))
    mean, variance = mean.astype(jnp.float32), variance.astype(jnp.float32)
    return mean, jnp.sqrt(variance + self.eps)
