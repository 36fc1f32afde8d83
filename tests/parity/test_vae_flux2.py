"""AutoencoderKLFlux2 against diffusers in float32; 1e-4 allows for the order of summation only."""

import jax
import numpy as np
import pytest

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.encoders import load_vae
from rtdmd_jax.models.vae import decode_images, encode_images
from rtdmd_jax.models.vae_flux2 import Flux2VAEConfig
from rtdmd_jax.weights.safetensors import read_config, save_params
from tests.parity import flux_reference

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity
TOLERANCE = 1e-4

CONFIG = dict(
  block_out_channels=(8, 16, 16),
  down_block_types=("DownEncoderBlock2D",) * 3,
  up_block_types=("UpDecoderBlock2D",) * 3,
  layers_per_block=1,
  latent_channels=4,
  norm_num_groups=4,
)


def reference(**changes):
  model = flux_reference.randomised(diffusers.AutoencoderKLFlux2, CONFIG | changes)
  # Published statistics are far from zero and one, and differ from feature to feature.
  model.bn.running_mean.copy_(torch.randn(16))
  model.bn.running_var.copy_(0.2 + torch.rand(16))
  return model


def pipeline_with(vae):
  """Enough of diffusers' pipeline to call its own encoding of images."""
  pipeline = object.__new__(diffusers.Flux2KleinPipeline)
  object.__setattr__(pipeline, "vae", vae)
  return pipeline


def reference_decode(model, latents):
  """The end of Flux2KleinPipeline's call."""
  x = torch.tensor(latents.transpose(0, 3, 1, 2))
  std = torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + model.config.batch_norm_eps)
  x = x * std + model.bn.running_mean.view(1, -1, 1, 1)
  images = model.decode(diffusers.Flux2KleinPipeline._unpatchify_latents(x)).sample
  return (0.5 * images.permute(0, 2, 3, 1) + 0.5).clamp(0, 1).numpy()


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [{}, {"use_quant_conv": False, "use_post_quant_conv": False}]
  + [{"decoder_block_out_channels": (4, 8, 24)}],
  ids=["published", "plain", "wide decoder"],
)
def test_encode_and_decode_equal_diffusers(tmp_path, changes):
  model = reference(**changes)
  model.save_pretrained(tmp_path)
  vae, params = load_vae(tmp_path)
  assert vae.config.factor == 8
  rng = np.random.default_rng(0)
  images = rng.uniform(0, 1, (2, 24, 16, 3)).astype(np.float32)
  latents = rng.normal(size=(2, 3, 2, 16)).astype(np.float32)
  with torch.no_grad():
    pixels = 2 * torch.tensor(images.transpose(0, 3, 1, 2)) - 1
    encoded = pipeline_with(model)._encode_vae_image(pixels, None).permute(0, 2, 3, 1).numpy()
    decoded = reference_decode(model, latents)
  got = jax.jit(lambda p, x: encode_images(vae, p, x))(params, images)
  assert got.shape == (2, 3, 2, 16)
  np.testing.assert_allclose(got, encoded, atol=TOLERANCE)
  got = jax.jit(lambda p, x: decode_images(vae, p, x))(params, latents)
  assert decoded.std() > 0.01
  np.testing.assert_allclose(got, decoded, atol=TOLERANCE)


def test_written_weights_load_in_diffusers(tmp_path):
  model = reference()
  model.save_pretrained(tmp_path)
  vae, params = load_vae(tmp_path)
  save_params(tmp_path / "diffusion_pytorch_model.safetensors", params, vae.table)
  again = diffusers.AutoencoderKLFlux2.from_pretrained(tmp_path, low_cpu_mem_usage=False)
  flux_reference.assert_same_weights(again, model)


@pytest.mark.parametrize(
  "change, message",
  [({"patch_size": [1, 1]}, "patch_size"), ({"act_fn": "relu"}, "relu")]
  + [({"scaling_factor": 1.0}, "scaling_factor")],
)
def test_bad_configs(tmp_path, change, message):
  reference().save_pretrained(tmp_path)
  with pytest.raises(UserError, match=message):
    Flux2VAEConfig.from_dict(read_config(tmp_path) | change)
