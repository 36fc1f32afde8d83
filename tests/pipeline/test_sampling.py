import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.algo import schedules
from rtdmd_jax.errors import UserError
from rtdmd_jax.pipeline import sampling

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
    ("flux2", {"shift": 3.0, "use_dynamic_shifting": False}),
    ("sd3", {"shift": 1.5, "time_shift_type": "linear", "max_shift": 2.0}),
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
    ("sd3", {"use_beta_sigmas": True}, "use_beta_sigmas"),
    ("sd3", {"use_exponential_sigmas": True}, "use_exponential_sigmas"),
    ("sd3", {"invert_sigmas": True}, "invert_sigmas"),
    ("sd3", {"stochastic_sampling": True}, "stochastic_sampling"),
    ("sd3", {"num_train_timesteps": 500}, "num_train_timesteps = 500"),
    ("sd3", {"shift": None}, "shift = None"),
    ("sd3", {"shift": float("nan")}, "shift = nan"),
    ("sd3", {"shift": 0}, "shift = 0"),
    ("sd3", {"use_dynamic_shifting": "no"}, "use_dynamic_shifting = 'no'"),
    ("flux1", {"use_dynamic_shifting": True, "time_shift_type": "cubic"}, "time_shift_type"),
    ("flux2", {"use_dynamic_shifting": True, "shift_terminal": 2}, "shift_terminal = 2"),
    ("flux2", {"use_flow_sigmas": True}, "use_flow_sigmas = True"),
    ("sd3", {"_class_name": "DPMSolverMultistepScheduler"}, "'DPMSolverMultistepScheduler'"),
    ("sd3", {"_class_name": "FlowMatchHeunDiscreteScheduler"}, "'FlowMatchHeunDiscrete"),
  ],
)
def test_schedulers_that_are_not_supported(family, options, name):
  with pytest.raises(UserError, match=name):
    sampling.Schedule.from_config(family, options)


def test_a_terminal_level_needs_two_steps():
  schedule = sampling.Schedule("flux2", dynamic=True, terminal=0.1)
  with pytest.raises(UserError, match="shift_terminal = 0.1 cannot be reached in 1 step"):
    schedule.few_step_sigmas([1000], 1024)


def test_every_key_that_diffusers_writes_is_read():
  diffusers = pytest.importorskip("diffusers")
  written = json.loads(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).to_json_string())
  assert sampling.Schedule.from_config("sd3", written) == sampling.Schedule("sd3", shift=3.0)
  assert set(written) - {"_class_name", "_diffusers_version"} == sampling._KEYS


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_images_that_are_not_finite_are_found(bad):
  def decode(latents, *, clamp):
    assert not clamp
    return 2.0 * latents

  latents = jnp.full((3, 2, 2, 3), 0.4).at[1, 0, 1, 2].set(bad).at[2].set(3.0)
  images, finite = jax.jit(lambda x: sampling.checked_images(decode, x))(latents)
  assert finite.tolist() == [True, False, True]
  assert float(images[0].min()) == pytest.approx(0.8) and float(images[2].max()) == 1.0
  # Latents that a decoder forgives are found, too.
  plain = lambda latents, *, clamp: jnp.nan_to_num(latents)  # noqa: E731
  assert sampling.checked_images(plain, latents)[1].tolist() == [True, False, True]
  with pytest.raises(UserError, match="the image of prompt b has values that are not finite"):
    sampling.refuse_nonfinite(np.asarray(finite), ["a", "b"])
  sampling.refuse_nonfinite(np.asarray(finite), ["a"])


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
