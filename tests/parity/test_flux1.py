"""FLUX.1 against diffusers in float32; 1e-4 leaves room for the order of summation only."""

import numpy as np
import pytest

from rtdmd_jax.models.flux1 import positions
from tests.parity import flux_reference

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

SCHNELL = dict(
  in_channels=16,
  num_layers=2,
  num_single_layers=3,
  attention_head_dim=16,
  num_attention_heads=3,
  joint_attention_dim=20,
  pooled_projection_dim=12,
  axes_dims_rope=(4, 6, 6),
)
DEV = SCHNELL | dict(guidance_embeds=True)


def reference(config):
  return flux_reference.randomised(diffusers.FluxTransformer2DModel, config)


def inputs(config, height=6, width=10):
  latents, tokens, pooled = flux_reference.arrays((2, height, width, 4), (2, 7, 20), (2, 12))
  sigma = np.array([0.9, 0.25], np.float32)
  guidance = np.array([3.5, 1.0], np.float32) if config.get("guidance_embeds") else None
  return latents, sigma, tokens, pooled, guidance


def run_reference(model, latents, sigma, tokens, pooled, guidance):
  """The call of diffusers' FluxPipeline, with its own packing and ids."""
  pipeline = diffusers.FluxPipeline
  b, h, w, c = latents.shape
  packed = pipeline._pack_latents(latents.permute(0, 3, 1, 2), b, c, h, w)
  out = model(
    hidden_states=packed,
    timestep=1000 * torch.as_tensor(sigma) / 1000,
    guidance=None if guidance is None else torch.as_tensor(guidance),
    pooled_projections=torch.as_tensor(pooled),
    encoder_hidden_states=torch.as_tensor(tokens),
    txt_ids=torch.zeros(tokens.shape[1], 3),
    img_ids=pipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32),
    return_dict=False,
  )[0]
  return pipeline._unpack_latents(out, 8 * h, 8 * w, 8).permute(0, 2, 3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("config", [SCHNELL, DEV], ids=["schnell", "dev"])
def test_velocity_and_gradient_match_diffusers(tmp_path, config):
  model = reference(config)
  flux_reference.assert_same_velocity(tmp_path, model, run_reference, *inputs(config))


def test_positions_equal_the_pipeline():
  want = diffusers.FluxPipeline._prepare_latent_image_ids(1, 5, 3, "cpu", torch.float32)
  got = positions(4, 5, 3)
  assert not got[:4].any()
  np.testing.assert_array_equal(got[4:], want)


@pytest.mark.parametrize("config", [SCHNELL, DEV], ids=["schnell", "dev"])
def test_written_checkpoint_loads_in_diffusers(tmp_path, config):
  flux_reference.assert_written_checkpoint_loads(tmp_path, reference(config))
