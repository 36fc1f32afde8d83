import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.models.vae import AutoencoderKL, VAEConfig
from rtdmd_jax.pretrain.spoil import decode_worn_and_spoiled, spoil, wear

Z = jax.random.normal(jax.random.key(0), (400, 8, 8, 4))
OTHER = jax.random.normal(jax.random.key(1), (400, 8, 8, 4))


def test_worn_latents_stay_close_and_spoiled_ones_do_not():
  worn = jnp.std(wear(Z, jax.random.key(2)) - Z, axis=(1, 2, 3))
  spoiled = jnp.std(spoil(Z, OTHER, jax.random.key(2)) - Z, axis=(1, 2, 3))
  assert 0.0 < worn.min() and worn.max() < 0.36  # 0.3 and the spread of 256 values
  assert spoiled.min() > 0.35


def test_four_kinds_of_damage():
  bad = np.asarray(spoil(Z, OTHER, jax.random.key(3)))
  pasted = (bad == OTHER).mean((1, 2, 3)) > 0.1
  # A quarter of the area, whole cells of the other scene, and the rest untouched.
  assert np.all(((bad == OTHER) | (bad == Z))[pasted])
  assert 0.15 < pasted.mean() < 0.35
  share = ((bad - Z) * (OTHER - Z)).sum((1, 2, 3)) / ((OTHER - Z) ** 2).sum((1, 2, 3))
  rest = np.abs(bad - Z - share[:, None, None, None] * (OTHER - Z)).max((1, 2, 3))
  blended = rest < 1e-3
  assert 0.15 < blended.mean() < 0.35
  assert np.all((share[blended] > 0.29) & (share[blended] < 0.71))
  blurred = bad.std((1, 2, 3)) < 0.5
  assert 0.15 < blurred.mean() < 0.35 and not np.any(blurred & blended)


def test_images_are_decoded_in_parts_with_the_same_seed():
  config = VAEConfig(
    block_out_channels=(4, 4),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=2,
  )
  vae = AutoencoderKL(config)
  images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
  params = vae.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
  first = decode_worn_and_spoiled(vae, params, images, seed=1, chunk=8)
  again = decode_worn_and_spoiled(vae, params, images, seed=1, chunk=8)
  assert first.worn.shape == first.spoiled.shape == images.shape
  assert first.worn.dtype == first.spoiled.dtype == np.uint8
  np.testing.assert_array_equal(first.spoiled, again.spoiled)
  assert np.any(first.worn != first.spoiled)
