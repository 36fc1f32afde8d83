"""Our rounding errors in bfloat16 against diffusers' own, each model against itself in float32."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity import backbones
from tests.parity.backbones import BACKBONES

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.parity, pytest.mark.slow]

# 1000 sigma and 1000 guidance have no rounding error in bfloat16: diffusers rounds both in FLUX,
# we do not, and what is compared is the network.
SIGMA = np.float32([1.0, 0.25])
GUIDANCE = np.float32([4.0, 1.0])


def rms(x):
  return float(np.sqrt(np.mean(np.square(x))))


@pytest.mark.parametrize("name", BACKBONES)
def test_the_error_is_at_most_twice_that_of_diffusers(name, tmp_path):
  backbone = BACKBONES[name]
  model = backbone.reference()
  half = copy.deepcopy(model).to(torch.bfloat16)
  velocities = {}
  for dtype in (jnp.float32, jnp.bfloat16):
    transformer, params = backbones.loaded(model, tmp_path, dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    latents, tokens, pooled = backbones.inputs(transformer, batch=2)
    guidance = GUIDANCE if transformer.embedded_guidance else None
    out = jax.jit(transformer.velocity)(params, latents, SIGMA, tokens, pooled, guidance)
    assert out.dtype == jnp.float32
    velocities[dtype] = np.asarray(out)

  def run(model, dtype):
    arrays = (latents, tokens, pooled)
    x, text, vector = (None if a is None else torch.tensor(a, dtype=dtype) for a in arrays)
    with torch.no_grad():
      return backbone.run(model, x, SIGMA, text, vector, guidance).float().numpy()

  want = run(model, torch.float32)
  np.testing.assert_allclose(velocities[jnp.float32], want, atol=1e-4)
  theirs = rms(run(half, torch.bfloat16) - want)
  ours = rms(velocities[jnp.bfloat16] - want)
  print(f"{name}: error {ours:.2e}, diffusers' {theirs:.2e}")
  assert 0 < ours < 2 * theirs
