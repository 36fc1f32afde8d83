import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax import sampling
from rtdmd_jax.algo import schedules
from rtdmd_jax.errors import UserError

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


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize(
  "family, options",
  [
    ("sd3", {"shift": 3.0}),
    ("flux1", {"shift": 1.0}),
    ("flux1", {"use_dynamic_shifting": True}),
    ("flux2", {"use_dynamic_shifting": True}),
    ("flux2", {"use_dynamic_shifting": True, "time_shift_type": "linear"}),
  ],
)
def test_schedules_equal_the_pipelines_of_diffusers(family, options, steps):
  diffusers = pytest.importorskip("diffusers")
  from diffusers.pipelines.flux.pipeline_flux import calculate_shift
  from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
  mu = {"flux1": calculate_shift(1024), "flux2": compute_empirical_mu(1024, steps)}.get(family)
  sigmas = None if family == "sd3" else np.linspace(1.0, 1 / steps, steps)
  scheduler.set_timesteps(None if sigmas is not None else steps, sigmas=sigmas, mu=mu)
  schedule = sampling.Schedule.from_config(family, scheduler.config)
  got = schedule.euler_sigmas(steps, 1024)
  np.testing.assert_allclose(got, scheduler.sigmas.numpy(), atol=2e-6)


def test_dynamic_few_steps_are_the_schedules_of_the_family():
  schedule = sampling.Schedule("flux2", dynamic=True, terminal=0.1)
  got = schedule.few_step_sigmas((1000, 750, 500, 250), 1024)
  want = schedules.flux2_sigmas((1000, 750, 500, 250), image_tokens=1024, shift_terminal=0.1)
  np.testing.assert_array_equal(got[:-1], want)
  assert got[-1] == 0 and got[-2] == pytest.approx(0.1)


@pytest.mark.parametrize(
  "family, options, name",
  [
    ("sd3", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
    ("flux1", {"use_dynamic_shifting": True, "max_shift": 2.0}, "max_shift"),
    ("flux1", {"shift_terminal": 0.1}, "shift_terminal"),
    ("flux2", {"use_karras_sigmas": True}, "use_karras_sigmas"),
  ],
)
def test_schedulers_that_are_not_supported(family, options, name):
  with pytest.raises(UserError, match=name):
    sampling.Schedule.from_config(family, options)


@pytest.mark.parametrize("eta", [0.0, 0.9])
def test_one_key_an_image_is_that_image_alone(eta):
  seeds, index, sigmas = jnp.array([3, 3, 9], jnp.uint32), jnp.array([0, 5, 5]), [1.0, 0.6, 0.0]
  velocity = lambda x, sigma: jnp.tanh(x) * sigma[:, None]  # noqa: E731
  keys = jax.vmap(jax.random.key)(seeds)
  got = sampling.sample(velocity, keys, index, (4,), sigmas, eta=eta)
  for i in range(3):
    key = jax.random.key(int(seeds[i]))
    alone = sampling.sample(velocity, key, index[i : i + 1], (4,), sigmas, eta=eta)
    np.testing.assert_allclose(got[i], alone[0], rtol=1e-6)
  assert len({float(x[0]) for x in got}) == 3
