"""The autoencoder's decoder: what a backward pass keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.models.vae import AutoencoderKL, VAEConfig, decode_images

CONFIG = VAEConfig(
  up_block_types=("UpDecoderBlock2D",) * 2,
  down_block_types=("DownEncoderBlock2D",) * 2,
  block_out_channels=(16, 32),
  layers_per_block=2,
  norm_num_groups=8,
  use_quant_conv=False,
  use_post_quant_conv=False,
)


@pytest.mark.slow
def test_recomputed_blocks_save_memory_and_change_no_gradient():
  """Rematerialisation takes less memory and gives the same gradient."""
  latents = jax.random.normal(jax.random.key(0), (2, 16, 16, 4))
  plain = AutoencoderKL(CONFIG)
  params = plain.init(jax.random.key(1), jnp.zeros((1, 8, 8, 3)))["params"]
  gradients, temporaries = [], []
  for remat in ("none", "full"):
    vae = plain.clone(remat=remat)
    program = jax.jit(jax.grad(lambda z, vae=vae: jnp.sum(decode_images(vae, params, z) ** 2)))
    compiled = program.lower(latents).compile()
    gradients.append(compiled(latents))
    temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
  assert np.abs(gradients[0]).max() > 1e-3
  np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)
  assert temporaries[1] < 0.75 * temporaries[0], temporaries
