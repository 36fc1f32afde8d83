import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.models import build_transformer, load_transformer
from rtdmd_jax.weights.safetensors import load_params, read_config, save_params

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
  torch.manual_seed(0)
  model = diffusers.SD3Transformer2DModel(**config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.05 * torch.randn_like(parameter))
  return model


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
  model = reference(config)
  model.save_pretrained(tmp_path, max_shard_size=shard_size)
  assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "40KB")
  latents, sigma, tokens, pooled = inputs()
  leaf = torch.tensor(latents, requires_grad=True)
  want = run_reference(model, leaf, sigma, tokens, pooled)
  want.square().sum().backward()

  velocity, params = load_transformer(tmp_path, dtype=jnp.float32)

  def loss(x):
    out = velocity(params, x, sigma, tokens, pooled, None)
    return jnp.square(out).sum(), out

  (_, got), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(latents)
  assert np.abs(want.detach().numpy()).max() > 0.1
  np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-4, rtol=0)
  np.testing.assert_allclose(gradient, leaf.grad.numpy(), atol=1e-3, rtol=1e-3)


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
  model = reference(config)
  model.save_pretrained(tmp_path / "a")
  transformer = build_transformer(read_config(tmp_path / "a"))
  params = load_params(tmp_path / "a", transformer.init_abstract(), transformer.table)
  model.save_config(tmp_path / "b")
  save_params(tmp_path / "b" / "diffusion_pytorch_model.safetensors", params, transformer.table)
  again, info = diffusers.SD3Transformer2DModel.from_pretrained(
    tmp_path / "b", output_loading_info=True
  )
  assert not any(info.values())
  want = model.state_dict()
  got = again.state_dict()
  assert got.keys() == want.keys()
  for key in want:
    assert torch.equal(got[key], want[key]), key


@pytest.mark.parametrize("config", [SD3, SD35 | dict(sample_size=10)], ids=["sd3", "sd35"])
def test_computed_position_table_equals_the_buffer(config):
  model = reference(config)
  transformer = build_transformer(json.loads(model.to_json_string()))
  params = transformer.init(jax.random.key(0))
  np.testing.assert_allclose(
    params["pos_embed"]["pos_embed"], model.pos_embed.pos_embed.numpy(), atol=1e-6, rtol=0
  )
