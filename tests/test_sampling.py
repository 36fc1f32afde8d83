import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax import sampling

SHAPE = (2, 2, 3)


def _velocity_to(x0):
  """The exact velocity of a distribution that is one point."""
  return lambda x, sigma: (x - x0) / sigma[:, None, None, None]


@pytest.mark.parametrize("eta", [0.0, 0.9])
def test_an_exact_velocity_is_sampled_exactly(eta):
  x0 = jax.random.normal(jax.random.key(1), (4, *SHAPE))
  sigmas = sampling.few_step_sigmas((1000, 750, 500, 250), shift=3.0)
  x = sampling.sample(_velocity_to(x0), jax.random.key(0), jnp.arange(4), SHAPE, sigmas, eta=eta)
  np.testing.assert_allclose(x, x0, atol=1e-5)


def test_an_image_depends_on_its_index_alone():
  velocity = lambda x, sigma: 0.5 * x + sigma[:, None, None, None]  # noqa: E731
  sigmas = sampling.few_step_sigmas((1000, 500), shift=3.0)
  run = lambda index: sampling.sample(  # noqa: E731
    velocity, jax.random.key(0), jnp.array(index, jnp.uint32), SHAPE, sigmas, eta=0.9
  )
  together, alone = run([5, 6, 7]), run([6])
  np.testing.assert_allclose(together[1], alone[0], atol=1e-6)
  assert float(jnp.abs(together[0] - together[1]).max()) > 0.1


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_euler_schedule_equals_diffusers(steps):
  diffusers = pytest.importorskip("diffusers")
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
  scheduler.set_timesteps(steps)
  expected = scheduler.sigmas.numpy()
  np.testing.assert_allclose(sampling.euler_sigmas(steps, shift=3.0), expected, atol=1e-6)
