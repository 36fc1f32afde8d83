"""FLUX.2 against diffusers in float32; 1e-4 leaves room for the order of summation only."""

import numpy as np
import pytest

from rtdmd_jax.models.flux2 import positions
from tests.parity import flux_reference

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

KLEIN = dict(
  in_channels=12,
  num_layers=2,
  num_single_layers=3,
  attention_head_dim=16,
  num_attention_heads=3,
  joint_attention_dim=20,
  timestep_guidance_channels=32,
  mlp_ratio=2.5,
  axes_dims_rope=(2, 4, 6, 4),
  guidance_embeds=False,
)
DEV = KLEIN | dict(guidance_embeds=True)


def reference(config):
  return flux_reference.randomised(diffusers.Flux2Transformer2DModel, config)


def inputs(config, height=3, width=5):
  latents, tokens = flux_reference.arrays((2, height, width, 12), (2, 7, 20))
  sigma = np.array([0.9, 0.25], np.float32)
  guidance = np.array([3.5, 1.0], np.float32) if config["guidance_embeds"] else None
  return latents, sigma, tokens, None, guidance


def run_reference(model, latents, sigma, tokens, pooled, guidance):
  """The call of diffusers' Flux2KleinPipeline, with its own packing and ids."""
  assert pooled is None
  pipeline = diffusers.Flux2KleinPipeline
  h, w = latents.shape[1:3]
  latents, tokens = latents.permute(0, 3, 1, 2), torch.as_tensor(tokens)
  image_ids = pipeline._prepare_latent_ids(latents)
  out = model(
    hidden_states=pipeline._pack_latents(latents),
    timestep=1000 * torch.as_tensor(sigma) / 1000,
    guidance=None if guidance is None else torch.as_tensor(guidance),
    encoder_hidden_states=tokens,
    txt_ids=pipeline._prepare_text_ids(tokens),
    img_ids=image_ids,
    return_dict=False,
  )[0]
  return pipeline._unpack_latents_with_ids(out, image_ids, h, w).permute(0, 2, 3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("config", [KLEIN, DEV], ids=["klein", "dev"])
def test_velocity_and_gradient_match_diffusers(tmp_path, config):
  model = reference(config)
  flux_reference.assert_same_velocity(tmp_path, model, run_reference, *inputs(config))


def test_positions_equal_the_pipeline():
  pipeline = diffusers.Flux2KleinPipeline
  want = [pipeline._prepare_text_ids(torch.zeros(1, 4, 2))[0]]
  want.append(pipeline._prepare_latent_ids(torch.zeros(1, 2, 5, 3))[0])
  np.testing.assert_array_equal(positions(4, 5, 3), torch.cat(want))


@pytest.mark.parametrize("config", [KLEIN, DEV], ids=["klein", "dev"])
def test_written_checkpoint_loads_in_diffusers(tmp_path, config):
  flux_reference.assert_written_checkpoint_loads(tmp_path, reference(config))
