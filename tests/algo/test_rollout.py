import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.algo import rollout
from rtdmd_jax.algo.transitions import cps_step, x0_from_v

SIGMAS = jnp.float32([1.0, 0.9, 0.75, 0.5, 0.0])
KEYS = jax.random.split(jax.random.key(1), 3)
NOISE = jax.random.normal(KEYS[0], (2, 3))
STEP_NOISE = jax.random.normal(KEYS[1], (4, 2, 3))
W = 0.5 * jax.random.normal(KEYS[2], (3, 3))


def field(w):
  return lambda x, sigma: jnp.tanh(x @ w) + sigma[:, None]


def by_hand(w, last_w, stop):
  x = NOISE
  for i in range(stop):
    v = field(last_w if i == stop - 1 else w)(x, jnp.full((2,), SIGMAS[i]))
    before, x = x, cps_step(x, v, SIGMAS[i], SIGMAS[i + 1], 0.9, STEP_NOISE[i])
  return before, v, x


def run(w, stop):
  return rollout.generator_rollout(field(w), NOISE, SIGMAS, STEP_NOISE, eta=0.9, stop=stop)


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_rollout_equals_the_steps_by_hand(stop):
  before, v, after = by_hand(W, W, stop)
  for last in (run(W, stop), jax.jit(run)(W, stop)):
    np.testing.assert_allclose(last.x, before, atol=1e-5)
    np.testing.assert_allclose(last.v, v, atol=1e-5)
    np.testing.assert_allclose(last.x_next, after, atol=1e-5)
    np.testing.assert_allclose(last.x0, x0_from_v(before, v, SIGMAS[stop - 1]), atol=1e-5)
    assert last.sigma == SIGMAS[stop - 1] and last.next_sigma == SIGMAS[stop]


@pytest.mark.parametrize("stop", [1, 4])
def test_without_gradient_one_network_takes_the_same_steps(stop):
  def alone(w, stop):
    return rollout.generator_rollout(
      field(w), NOISE, SIGMAS, STEP_NOISE, eta=0.9, stop=stop, differentiable=False
    )

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jax.jit(alone)(W, stop), run(W, stop)
  )
  assert not np.any(jax.grad(lambda w: jnp.sum(alone(w, stop).x_next))(W))
  calls = [str(jax.make_jaxpr(f)(W, stop)).count("dot_general") for f in (alone, run)]
  assert calls == [1, 2]


@pytest.mark.parametrize("stop", [1, 2, 4])
@pytest.mark.parametrize("remat", [False, True])
def test_gradient_passes_through_the_last_step_only(stop, remat):
  def loss(w, stop):
    velocity = jax.checkpoint(field(w)) if remat else field(w)
    last = rollout.generator_rollout(velocity, NOISE, SIGMAS, STEP_NOISE, eta=0.9, stop=stop)
    return jnp.sum(last.x_next**2)

  expected = jax.grad(lambda w: jnp.sum(by_hand(W, w, stop)[2] ** 2))(W)
  np.testing.assert_allclose(jax.grad(loss)(W, stop), expected, atol=1e-5)
  np.testing.assert_allclose(jax.jit(jax.grad(loss))(W, stop), expected, atol=1e-5)


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_traced_stop_runs_the_network_stop_times(stop):
  calls = []

  def loss(w, stop):
    def velocity(x, sigma):
      jax.debug.callback(lambda s: calls.append(float(s)), sigma[0])
      return field(w)(x, sigma)

    out = rollout.generator_rollout(velocity, NOISE, SIGMAS, STEP_NOISE, eta=0.9, stop=stop)
    return jnp.sum(out.x_next)

  jax.block_until_ready(jax.jit(jax.value_and_grad(loss))(W, stop))
  jax.effects_barrier()
  np.testing.assert_allclose(sorted(calls, reverse=True), SIGMAS[:stop])


def test_sample_rollout_records_every_transition():
  t = jax.jit(lambda w: rollout.sample_rollout(field(w), NOISE, SIGMAS, STEP_NOISE, eta=0.9))(W)
  for stop in (1, 2, 3, 4):
    last = run(W, stop)
    np.testing.assert_allclose(t.x[stop - 1], last.x, atol=1e-5)
    np.testing.assert_allclose(t.v[stop - 1], last.v, atol=1e-5)
    np.testing.assert_allclose(t.x_next[stop - 1], last.x_next, atol=1e-5)
  std = np.asarray(SIGMAS[1:]) * np.sin(0.9 * np.pi / 2)
  np.testing.assert_allclose(
    t.log_prob, -(std[:, None] ** 2) * np.mean(STEP_NOISE**2, axis=-1), rtol=1e-4, atol=1e-7
  )
  grad = jax.grad(
    lambda w: rollout.sample_rollout(field(w), NOISE, SIGMAS, STEP_NOISE, eta=0.9).x_next.sum()
  )(W)
  assert not np.any(grad)


def test_subinterval_start():
  last, z = run(W, 2), jnp.ones((2, 3))
  options = {"noise": z, "eta": 0.9}
  x_s, s = rollout.subinterval_start(last, SIGMAS, mode="next_sigma", boundary_index=2, **options)
  assert s == 0.75 and np.array_equal(x_s, last.x_next)
  x_s, s = rollout.subinterval_start(
    last, SIGMAS, mode="fixed_boundary", boundary_index=3, **options
  )
  assert s == 0.5
  np.testing.assert_allclose(x_s, cps_step(last.x, last.v, 0.9, 0.5, 0.9, z), atol=1e-6)
  _, s = rollout.subinterval_start(
    run(W, 4), SIGMAS, mode="fixed_boundary", boundary_index=1, **options
  )
  assert s == 0.5  # the step's own level lies below the boundary
  for mode, index in (("middle", 1), ("fixed_boundary", 0), ("fixed_boundary", 5)):
    with pytest.raises(ValueError):
      rollout.subinterval_start(last, SIGMAS, mode=mode, boundary_index=index, **options)


def test_errors():
  with pytest.raises(ValueError, match="stop 5"):
    run(W, 5)
  with pytest.raises(ValueError, match="step_noise"):
    rollout.sample_rollout(field(W), NOISE, SIGMAS, STEP_NOISE[:3], eta=0.9)
