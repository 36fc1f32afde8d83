import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.models import build_transformer, load_transformer
from tests.parity import flux_reference

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

SD3 = dict(
  sample_size=16,
  patch_size=2,
  in_channels=4,
  num_layers=4,
  attention_head_dim=8,
  num_attention_heads=3,
  joint_attention_dim=20,
  caption_projection_dim=24,
  pooled_projection_dim=12,
  out_channels=4,
  pos_embed_max_size=12,
)
SD35 = SD3 | dict(num_layers=5, dual_attention_layers=(0, 1), qk_norm="rms_norm")
MIXED = SD35 | dict(dual_attention_layers=(1, 4))


def reference(config):
  return flux_reference.randomised(diffusers.SD3Transformer2DModel, config)


def inputs(batch=2, height=10, width=14):
  rng = np.random.default_rng(1)
  shapes = [(batch, height, width, 4), (batch, 7, 20), (batch, 12)]
  latents, tokens, pooled = (rng.standard_normal(s).astype(np.float32) for s in shapes)
  return latents, np.array([0.9, 0.25], np.float32)[:batch], tokens, pooled


def run_reference(model, latents, sigma, tokens, pooled):
  out = model(
    hidden_states=torch.as_tensor(latents).permute(0, 3, 1, 2),
    timestep=1000 * torch.as_tensor(sigma),
    encoder_hidden_states=torch.as_tensor(tokens),
    pooled_projections=torch.as_tensor(pooled),
    return_dict=False,
  )[0]
  return out.permute(0, 2, 3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("config", [SD3, SD35, MIXED], ids=["sd3", "sd35", "mixed"])
@pytest.mark.parametrize("shard_size", ["10GB", "40KB"])
def test_velocity_and_gradient_match_diffusers(tmp_path, config, shard_size):
  flux_reference.assert_same_velocity(
    tmp_path, reference(config), run_reference, *inputs(), shard_size=shard_size
  )
  assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "40KB")


def test_full_size_latents_use_the_whole_position_table(tmp_path):
  model = reference(SD3)
  model.save_pretrained(tmp_path)
  args = inputs(height=24, width=24)
  velocity, params = load_transformer(tmp_path, dtype=jnp.float32)
  with torch.no_grad():
    want = run_reference(model, *args).numpy()
  np.testing.assert_allclose(jax.jit(velocity)(params, *args), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", [SD3, SD35], ids=["sd3", "sd35"])
def test_written_checkpoint_loads_in_diffusers(tmp_path, config):
  flux_reference.assert_written_checkpoint_loads(tmp_path, reference(config))


@pytest.mark.parametrize("config", [SD3, SD35 | dict(sample_size=10)], ids=["sd3", "sd35"])
def test_computed_position_table_equals_the_buffer(config):
  model = reference(config)
  transformer = build_transformer(json.loads(model.to_json_string()))
  params = transformer.init(jax.random.key(0))
  np.testing.assert_allclose(
    params["pos_embed"]["pos_embed"], model.pos_embed.pos_embed.numpy(), atol=1e-6, rtol=0
  )
