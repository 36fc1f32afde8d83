"""Inputs and reference runs that the tests of the families share."""

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.models import build_transformer, load_transformer
from rtdmd_jax.weights.safetensors import load_params, read_config, save_params


def randomised(cls, config, scale=0.05):
  """A diffusers model without zero gates or unit norms."""
  import torch

  torch.manual_seed(0)
  model = cls(**config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(scale * torch.randn_like(parameter))
  return model


def arrays(*shapes, seed=1):
  """Standard normal float32 arrays."""
  rng = np.random.default_rng(seed)
  return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def assert_same_weights(got, want):
  """Compares two models tensor by tensor, exactly."""
  import torch

  got, want = got.state_dict(), want.state_dict()
  assert got.keys() == want.keys()
  for key in want:
    assert torch.equal(got[key], want[key]), key


def assert_same_velocity(directory, model, run_reference, latents, *rest, shard_size="10GB"):
  """Compares velocity and gradient; 1e-4 leaves room for the order of summation only."""
  import torch

  model.save_pretrained(directory, max_shard_size=shard_size)
  leaf = torch.tensor(latents, requires_grad=True)
  want = run_reference(model, leaf, *rest)
  want.square().sum().backward()
  velocity, params = load_transformer(directory, dtype=jnp.float32)

  def loss(x):
    out = velocity(params, x, *rest)
    return jnp.square(out).sum(), out

  (_, got), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(latents)
  assert np.abs(want.detach().numpy()).max() > 0.1
  np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-4, rtol=0)
  np.testing.assert_allclose(gradient, leaf.grad.numpy(), atol=1e-3, rtol=1e-3)


def assert_written_checkpoint_loads(directory, model):
  """Loads a diffusers transformer, writes it, and has diffusers load that strictly."""
  model.save_pretrained(directory / "a")
  transformer = build_transformer(read_config(directory / "a"))
  params = load_params(directory / "a", transformer.init_abstract(), transformer.table)
  model.save_config(directory / "b")
  save_params(directory / "b/diffusion_pytorch_model.safetensors", params, transformer.table)
  again, info = type(model).from_pretrained(directory / "b", output_loading_info=True)
  assert not any(info.values())
  assert_same_weights(again, model)
