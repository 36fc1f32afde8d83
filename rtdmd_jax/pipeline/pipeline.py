"""A pretrained text-to-image pipeline from a diffusers-layout directory."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rtdmd_jax.errors import UserError
from rtdmd_jax.models import Transformer, load_base
from rtdmd_jax.models.vae import AutoencoderKL, decode_images
from rtdmd_jax.pipeline import sampling
from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.pipeline.describe import PipelineDescription, describe_pipeline
from rtdmd_jax.pipeline.text import TextEncoder
from rtdmd_jax.pipeline.velocity import role_variables, role_velocity
from rtdmd_jax.runtime.compilation import jit
from rtdmd_jax.runtime.sharding import shard, split_or_replicate, to_numpy

FEW_STEPS = (1000, 750, 500, 250)


@dataclass(frozen=True)
class Pipeline:
  """Networks and parameters of one directory.

  Attributes:
    transformer: the velocity network.
    params: its parameters.
    vae: the autoencoder.
    vae_params: its parameters.
    text: the text encoders.
    schedule: of the noise levels.
  """

  transformer: Transformer
  params: Any
  vae: AutoencoderKL
  vae_params: Any
  text: TextEncoder
  schedule: sampling.Schedule

  @classmethod
  def from_pretrained(
    cls,
    directory: str | os.PathLike,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    remat: str = "none",
    attention: str = "auto",
    base_storage: str = "native",
    offload: bool = False,
  ) -> "Pipeline":
    """Loads a directory with `model_index.json`.

    Args:
      directory: transformer/, vae/, text encoders, tokenizers and scheduler/ in diffusers' layout,
        or the repository `org/name[@revision]` that has them (see `hub`).
      dtype: of parameters and computation.
      mesh: splits every parameter as the sharding table says; the current mesh by default.
      remat: what a backward pass through the transformer recomputes; see `build_transformer`.
      attention: the transformer's attention kernel; see `build_transformer`.
      base_storage: how the transformer's kernels are kept; a name in `weights.int8.STORAGES`.
      offload: kernels of its blocks and the text encoders' stay with the hosts; needs a mesh.

    Raises:
      UserError: a missing or broken file, a pipeline class or scheduler that is not supported, or
        networks that do not fit each other.
    """
    if mesh is not None:
      with jax.set_mesh(mesh):
        return cls.from_pretrained(
          directory,
          dtype=dtype,
          remat=remat,
          attention=attention,
          base_storage=base_storage,
          offload=offload,
        )
    description = describe_pipeline(
      directory, dtype=dtype, remat=remat, attention=attention, base_storage=base_storage
    )
    return cls.load(description, offload=offload)

  @classmethod
  def load(cls, description: PipelineDescription, *, offload: bool = False) -> "Pipeline":
    """Reads the weights and tokenizers of what was described; see `from_pretrained`."""
    d = description
    params = load_base(
      d.directory / "transformer", d.transformer, dtype=d.dtype, storage=d.storage, offload=offload
    )
    vae_params = d.vae.load(d.directory / "vae")
    text = d.text.load(d.directory)
    if offload:
      text = text._replace(params=shard(text.params, offload=True))
    return cls(d.transformer, params, d.vae.module, vae_params, text, d.schedule)

  @classmethod
  def abstract(cls, description: PipelineDescription) -> "Pipeline":
    """The pipeline with shapes for parameters, and without tokenizers."""
    d = description
    return cls(d.transformer, d.shapes, d.vae.module, d.vae.shapes, d.text.abstract(), d.schedule)

  def latent_shape(self, image_size: int | tuple[int, int]) -> tuple[int, int, int]:
    """Shape [h, w, C] of an image's latents, given its side or its (height, width).

    Raises:
      UserError: the size does not divide into the transformer's patches, or is beyond its
        positions.
    """
    _, patch, _, channels = self.transformer.example[0].shape
    factor = self.vae.config.factor
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    if any(side < 1 or side % (factor * patch) for side in sides):
      raise UserError(f"image_size is {image_size}; use a multiple of {factor * patch}.")
    longest = self.transformer.max_side
    if longest is not None and max(sides) > longest * factor:
      raise UserError(
        f"image_size is {image_size}; this transformer has positions for sides of at most"
        f" {longest * factor} pixels."
      )
    return sides[0] // factor, sides[1] // factor, channels

  def few_step_sigmas(
    self, steps: Sequence[float], image_size: int | tuple[int, int]
  ) -> np.ndarray:
    """Noise levels [K + 1] of the few steps (in 1000ths) at an image's size."""
    return self.schedule.few_step_sigmas(steps, self._image_tokens(image_size))

  def euler_sigmas(self, num_steps: int, image_size: int | tuple[int, int]) -> np.ndarray:
    """Noise levels [num_steps + 1] of the many-step sampler at an image's size."""
    return self.schedule.euler_sigmas(num_steps, self._image_tokens(image_size))

  def _image_tokens(self, image_size: int | tuple[int, int]) -> int:
    height, width, _ = self.latent_shape(image_size)
    patch = self.transformer.example[0].shape[1]
    return (height // patch) * (width // patch)

  def encode(self, prompts: Sequence[str]) -> Conditioning:
    """Conditioning of prompts, tokens [B, L, D] and pooled [B, P].

    Where B divides into `sharding.batch_parts()`, every device encodes its part of the prompts.
    """
    ids = split_or_replicate(self.text.tokenize(prompts))
    return jax.jit(self.text.encode)(self.text.params, ids)

  def velocity(
    self,
    params: Any,
    latents: jax.Array,
    sigma: jax.Array,
    conditioning: Conditioning,
    *,
    guidance: jax.Array | None = None,
  ) -> jax.Array:
    """Velocity [B, H, W, C] of latents [B, H, W, C] at sigma [B]; `guidance` [B] where embedded."""
    return self.transformer.velocity(
      params, latents, sigma, conditioning.tokens, conditioning.pooled, guidance
    )

  def decode(self, latents: jax.Array) -> jax.Array:
    """Images [B, H, W, 3] in [0, 1] of latents [B, h, w, C]."""
    return decode_images(self.vae, self.vae_params, latents)

  def sample(
    self,
    prompts: Sequence[str],
    key: jax.Array,
    *,
    image_size: int | tuple[int, int],
    steps: int | Sequence[float] = FEW_STEPS,
    guidance: float = 1.0,
    eta: float = 0.9,
    adapters: Any = None,
    index: np.ndarray | None = None,
  ) -> jax.Array:
    """Images [B, H, W, 3] in [0, 1], each a function of `key` and its index alone.

    Args:
      prompts: B prompts.
      key: of the noise.
      image_size: side in pixels, or (height, width).
      steps: a number of Euler steps, or the few steps (in 1000ths) of the stochastic sampler.
      guidance: classifier-free guidance scale, off at 1; an input of networks that embed it.
      eta: stochasticity of the few steps.
      adapters: adapter tree with its scale folded in.
      index: [B] image indices, 0 .. B - 1 by default.

    Raises:
      UserError: latents or pixels of an image that are not finite.
    """
    conditioning = self.encode(prompts)
    embedded = self.transformer.embedded_guidance
    unconditional = self.encode([""]) if guidance > 1 and not embedded else None
    if isinstance(steps, int):
      sigmas, eta = self.euler_sigmas(steps, image_size), 0.0
    else:
      sigmas = self.few_step_sigmas(steps, image_size)
    index = jnp.arange(len(prompts)) if index is None else jnp.asarray(index)
    variables = role_variables(self.params, adapters=adapters)
    shape = self.latent_shape(image_size)

    @jit
    def run(variables, vae_params, conditioning, unconditional):
      velocity = role_velocity(
        self.transformer.apply,
        variables,
        conditioning,
        unconditional=unconditional,
        guidance=guidance,
        embedded_guidance=embedded,
      )
      latents = sampling.sample(velocity, key, index, shape, sigmas, eta=eta)
      return sampling.checked_images(partial(decode_images, self.vae, vae_params), latents)

    images, finite = run(variables, self.vae_params, conditioning, unconditional)
    named = [f"{i} ({prompt!r})" for i, prompt in enumerate(prompts)]
    sampling.refuse_nonfinite(to_numpy(finite), named)
    return images
