"""Images as a half-trained generator makes them: worn ones, and ones that no caption fits.

A scorer that has only seen perfect drawings says little about the images it will have to rank. Both
kinds are made in the latent space of the pipeline's autoencoder and decoded.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.models.vae import AutoencoderKL, decode_images, encode_images

# Scenes are drawn tag after tag, so that this neighbour has the same tag.
_NEIGHBOUR = 6


class Decoded(NamedTuple):
  """Decoded images [N, H, W, 3] uint8: `worn` still show their scene, `spoiled` do not."""

  worn: np.ndarray
  spoiled: np.ndarray


def decode_worn_and_spoiled(
  vae: AutoencoderKL, params: Any, images: np.ndarray, seed: int, chunk: int = 120
) -> Decoded:
  """Encodes uint8 images [N, H, W, 3], wears and spoils their latents, and decodes both."""

  @jax.jit
  def both(part: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    z = encode_images(vae, params, part.astype(jnp.float32) / 255.0)
    wear_key, spoil_key = jax.random.split(key)
    pair = wear(z, wear_key), spoil(z, jnp.roll(z, _NEIGHBOUR, axis=0), spoil_key)
    return tuple(jnp.round(255.0 * decode_images(vae, params, p)).astype(jnp.uint8) for p in pair)

  parts = []
  for index, part in enumerate(np.array_split(images, -(-len(images) // chunk))):
    parts.append(jax.device_get(both(part, jax.random.fold_in(jax.random.key(seed), index))))
  return Decoded(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def wear(z: jax.Array, key: jax.Array) -> jax.Array:
  """Adds noise of a standard deviation of up to 0.3 to latents [B, h, w, C]."""
  level_key, noise_key = jax.random.split(key)
  level = 0.3 * jax.random.uniform(level_key, (z.shape[0], 1, 1, 1))
  return z + level * jax.random.normal(noise_key, z.shape)


def spoil(z: jax.Array, other: jax.Array, key: jax.Array) -> jax.Array:
  """One of four kinds of damage for each of the latents [B, h, w, C].

  A blend with the other scene, a window of it pasted in, strong noise, or blur.
  """
  kind_key, share_key, noise_key, corner_key = jax.random.split(key, 4)
  count, height, width, _ = z.shape
  share = jax.random.uniform(share_key, (count, 1, 1, 1))
  blend = z + (0.3 + 0.4 * share) * (other - z)
  noisy = z + (0.6 + 0.6 * share) * jax.random.normal(noise_key, z.shape)
  padded = jnp.pad(z, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
  blurred = sum(padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)) / 9
  corner = jax.random.uniform(corner_key, (2, count, 1, 1, 1)) * 0.5
  rows = (jnp.arange(height) / height)[:, None, None]
  columns = (jnp.arange(width) / width)[None, :, None]
  inside = (rows >= corner[0]) & (rows < corner[0] + 0.5)
  inside &= (columns >= corner[1]) & (columns < corner[1] + 0.5)
  pasted = jnp.where(inside, other, z)
  kind = jax.random.randint(kind_key, (count, 1, 1, 1), 0, 4)
  return jnp.select([kind == 0, kind == 1, kind == 2], [blend, noisy, blurred], pasted)
