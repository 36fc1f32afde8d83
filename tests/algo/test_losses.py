import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.algo import losses
from rtdmd_jax.algo.transitions import ambient_target, cps_step, renoise, x0_from_v
from tests.support.algo_inputs import NOISE, S, T, V, X


def linear(w):
  return lambda x, sigma: w * x + sigma.reshape(-1, 1, 1, 1)


def test_dmd_loss_recorded_and_its_gradient_is_g_over_size():
  loss, grad = jax.value_and_grad(losses.dmd_loss)(X, V, NOISE)
  assert loss == pytest.approx(2.8029905, rel=1e-6)
  recorded = [-0.3, 0.58, -0.36, -0.3, 0.1578947, 0.0745614, -0.0833333, 0.1315789]
  np.testing.assert_allclose(grad.ravel(), recorded, rtol=1e-5)
  assert losses.dmd_loss(X, V, NOISE, normalize=False) == pytest.approx(0.69703127, rel=1e-6)
  np.testing.assert_allclose(
    jax.grad(losses.dmd_loss, argnums=(1, 2))(X, V, NOISE), np.zeros((2, *X.shape))
  )


def test_dmd_normaliser_without_epsilon():
  """A sample equal to the teacher's prediction: 0/0 -> 0, x/0 -> the largest float."""
  x = jnp.zeros((2, 2))
  fake = jnp.float32([[0.0, 1.0], [1.0, 1.0]])
  real = jnp.float32([[0.0, 0.0], [2.0, 2.0]])
  grad = jax.grad(losses.dmd_loss)(x, fake, real)
  np.testing.assert_allclose(grad[1], [-0.5 / 4, -0.5 / 4])
  assert grad[0, 0] == 0 and grad[0, 1] == np.float32(np.finfo(np.float32).max / 4)


def test_inverse_scale_weight_recorded():
  scale = np.float32([0.1, 0.5, 1.0, 2.0, 0.0, np.nan])
  np.testing.assert_allclose(
    losses.inverse_scale_weight(scale, 0.0, 10.0), [10, 4, 1, 0.25, 10, 0], rtol=1e-6
  )


def test_fake_score_loss_by_hand():
  v, target = jnp.float32([[1.0, 2.0], [3.0, -1.0]]), jnp.float32([[0.0, 1.0], [1.0, 1.0]])
  scale = jnp.float32([0.5, 0.1])
  # weights 4 and clamp(100) = 10
  expected = (4 * (0.5**2 + 0**2) + 10 * (0.7**2 + 1.1**2)) / 4
  assert losses.fake_score_loss(v, target, scale) == pytest.approx(expected, rel=1e-6)
  column = losses.fake_score_loss(v, target, scale[:, None])
  assert column == pytest.approx(expected, rel=1e-6)


def test_flow_matching_loss_by_hand():
  loss = losses.flow_matching_loss(X * 0 + 1.0, X, X + 3.0, np.float32([1.0, 2.0]))
  assert loss == pytest.approx((4 + 8) / 2, rel=1e-6)


def test_consistency_loss_by_hand():
  anchor, first, second = (
    jnp.float32([[1.0], [0.0]]),
    jnp.float32([[3.0], [1.0]]),
    jnp.zeros((2, 1)),
  )
  # (2)(-1) and (1)(0)
  assert losses.consistency_loss(anchor, first, second) == -1.0
  assert losses.consistency_loss(anchor, first, first) == 2.5
  grads = jax.grad(losses.consistency_loss, argnums=(0, 1, 2))(anchor, first, second)
  np.testing.assert_allclose(grads[0].ravel(), [-0.5, -0.5])
  np.testing.assert_allclose(grads[1].ravel(), [-0.5, 0.0])
  np.testing.assert_allclose(grads[2].ravel(), [1.0, 0.5])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_consistency_counts_as_zero(bad):
  args = jnp.float32([[bad, 1.0]]), jnp.ones((1, 2)), jnp.zeros((1, 2))
  value, grads = jax.value_and_grad(losses.consistency_loss, argnums=(0, 1, 2))(*args)
  assert value == 0 and not any(np.any(g) for g in grads)


def test_clipped_policy_loss_by_hand():
  old = jnp.zeros(4)
  log_prob = jnp.log(jnp.float32([1.5, 1.5, 0.5, 0.5]))
  advantage = jnp.float32([2.0, -2.0, 2.0, -9.0])
  loss, grad = jax.value_and_grad(losses.clipped_policy_loss)(
    log_prob, old, advantage, clip_low=0.1, clip_high=0.2, limit=5.0
  )
  # max(-3, -2.4), max(3, 2.4), max(-1, -1.8), max(2.5, 4.5)
  assert loss == pytest.approx((-2.4 + 3 - 1 + 4.5) / 4, rel=1e-6)
  np.testing.assert_allclose(grad, [0, 0.75, -0.25, 0], rtol=1e-5)


def test_on_policy_ratio_is_exactly_one():
  log_prob = jnp.float32([-0.123, 4.56, -7.8])
  advantage = jnp.float32([1.0, -2.0, 0.5])

  def loss(p):
    return losses.clipped_policy_loss(
      p, jax.lax.stop_gradient(p), advantage, clip_low=1e-5, clip_high=1e-5, limit=5.0
    )

  value, grad = jax.value_and_grad(loss)(log_prob)
  assert value == -jnp.mean(advantage)
  np.testing.assert_allclose(grad, -advantage / 3, rtol=1e-6)


def test_kl_and_hinge_by_hand():
  mean, ref = jnp.float32([[1.0, 3.0], [0.0, 0.0]]), jnp.float32([[0.0, 1.0], [2.0, 0.0]])
  std = jnp.float32([0.5, 1.0])
  assert losses.kl_to_reference(mean, ref, std) == pytest.approx((2 + 8 + 2 + 0) / 4)
  assert not np.any(jax.grad(losses.kl_to_reference, argnums=1)(mean, ref, std))
  value, grad = jax.value_and_grad(losses.reward_hinge)(jnp.float32([1.0, 5.0, 2.5]), 3.0)
  assert value == pytest.approx(2.5 / 3)
  np.testing.assert_allclose(grad, [-1 / 3, 0, -1 / 3], rtol=1e-6)


def test_sample_weights():
  """A weight multiplies its sample's share; weight 0 removes even what is not finite."""
  w = jnp.float32([2.0, 0.0])
  broken = jnp.array(X).at[1].set(np.nan)
  value, grad = jax.value_and_grad(losses.dmd_loss)(broken, V, NOISE, weights=w)
  one = losses.dmd_loss(X[:1], V[:1], NOISE[:1])
  assert value == pytest.approx(float(one), rel=1e-6)
  np.testing.assert_allclose(grad[0], jax.grad(losses.dmd_loss)(X[:1], V[:1], NOISE[:1])[0])
  bad = jnp.float32([0.5, np.nan])
  assert losses.reward_hinge(bad, 3.0, weights=w) == 2.5
  options = {"clip_low": 0.1, "clip_high": 0.1, "limit": 5.0, "weights": w}
  assert losses.clipped_policy_loss(bad, bad, jnp.ones(2), **options) == -1.0
  kl = losses.kl_to_reference(jnp.array(X), jnp.array(V), 1.0, weights=w)
  assert kl == pytest.approx(float(losses.kl_to_reference(X[:1], V[:1], 1.0)), rel=1e-6)

  def generator(x, **kwargs):
    return losses.generator_loss(
      x, S[: len(x)], T[: len(x)], NOISE[: len(x)], V[: len(x)], linear(-0.2), linear(0.3),
      eta=0.9, **kwargs,
    )  # fmt: skip

  assert generator(X, weights=w) == pytest.approx(float(generator(X[:1])), rel=1e-5)


def test_generator_loss_is_its_parts():
  z = X[::-1]
  x_t = renoise(X, NOISE, S, T)
  fake = cps_step(x_t, linear(0.3)(x_t, jnp.array(T)), T, S, 0.9, z)
  real = cps_step(x_t, linear(-0.2)(x_t, jnp.array(T)), T, S, 0.9, z)

  def loss(x, teacher, score):
    return losses.generator_loss(x, S, T, NOISE, z, linear(teacher), linear(score), eta=0.9)

  value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(X, -0.2, 0.3)
  assert value == pytest.approx(float(losses.dmd_loss(X, fake, real)), rel=1e-4)
  np.testing.assert_allclose(grads[0], jax.grad(losses.dmd_loss)(X, fake, real), rtol=1e-4)
  assert grads[1] == 0 and grads[2] == 0


def test_transition_noise_cancels_in_the_direction_only():
  def grad(z, normalize):
    return jax.grad(losses.generator_loss)(
      X, S, T, NOISE, z, linear(-0.2), linear(0.3), eta=0.9, normalize=normalize
    )

  np.testing.assert_allclose(grad(0 * X, False), grad(3 * V, False), rtol=1e-4, atol=1e-6)
  assert np.abs(grad(3 * V, True)).sum() < np.abs(grad(0 * X, True)).sum()


def test_plain_generator_loss_is_its_parts():
  x_t = (1 - T.reshape(-1, 1, 1, 1)) * X + T.reshape(-1, 1, 1, 1) * NOISE
  fake = x0_from_v(x_t, linear(0.3)(x_t, jnp.array(T)), T)
  real = x0_from_v(x_t, linear(-0.2)(x_t, jnp.array(T)), T)
  value, grad = jax.value_and_grad(losses.plain_generator_loss)(
    X, T, NOISE, linear(-0.2), linear(0.3)
  )
  assert value == pytest.approx(float(losses.dmd_loss(X, fake, real)), rel=1e-4)
  np.testing.assert_allclose(grad, jax.grad(losses.dmd_loss)(X, fake, real), rtol=1e-4)


def ambient(w, x=X, **options):
  return losses.ambient_fake_score_loss(linear(w), x, S, T, NOISE, **options)


def test_ambient_loss_without_consistency():
  x_t = renoise(X, NOISE, S, T)
  target, scale = ambient_target(X, NOISE, S, T, scale_out=True)
  total, parts = ambient(0.4)
  expected = losses.fake_score_loss(linear(0.4)(x_t, jnp.array(T)), target, scale)
  assert total == pytest.approx(float(expected), rel=1e-6)
  assert parts["fake_score"] == total and parts["consistency"] == 0
  assert not np.any(jax.grad(lambda x: ambient(0.4, x)[0])(jnp.array(X)))


STEPS_BACK = np.float32([[0.1, 0.05], [0.05, 0.95]])  # the second sample reaches 0
PATHS = np.stack([np.stack([V, NOISE]), np.stack([X, -V])])


def hand_consistency(w, path_w):
  """Two chained moves per path; path_w drives the moves, w the anchor and both ends."""
  levels = [jnp.array(T)]
  for delta in STEPS_BACK:
    levels.append(jnp.maximum(levels[-1] - delta, 0))
  x_t = renoise(X, NOISE, S, T)
  anchor = x0_from_v(x_t, linear(w)(x_t, levels[0]), levels[0])
  ends = []
  for noise in PATHS:
    x = x_t
    for i in range(2):
      x = cps_step(x, linear(path_w)(x, levels[i]), levels[i], levels[i + 1], 0.7, noise[i])
    ends.append(x0_from_v(x, linear(w)(x, levels[2]), levels[2]))
  return anchor, ends


@pytest.mark.parametrize("two_sample", [True, False])
@pytest.mark.parametrize("stop", [True, False])
def test_ambient_loss_with_chained_consistency(two_sample, stop):
  def by_hand(w):
    anchor, ends = hand_consistency(w, 0.4 if stop else w)
    cons = losses.consistency_loss(anchor, ends[0], ends[1] if two_sample else ends[0])
    return ambient(w)[0] + 0.05 * cons

  def loss(w):
    return ambient(
      w,
      consistency_weight=0.05,
      steps_back=STEPS_BACK,
      transition_noise=PATHS if two_sample else PATHS[:1],
      eta=0.7,
      two_sample=two_sample,
      stop_transitions=stop,
    )[0]

  for actual, expected in zip(
    jax.jit(jax.value_and_grad(loss))(0.4), jax.value_and_grad(by_hand)(0.4), strict=True
  ):
    assert float(actual) == pytest.approx(float(expected), rel=1e-4)


def test_ambient_loss_argument_errors():
  with pytest.raises(ValueError, match="together"):
    ambient(0.4, steps_back=STEPS_BACK)
  with pytest.raises(ValueError, match="needs"):
    ambient(0.4, consistency_weight=0.01)


def test_two_sample_estimator_is_the_squared_bias():
  """Over independent +-1 noises a linear field's estimate averages to the squared bias exactly."""
  s, t, back, eta = 0.3, 0.8, 0.2, 0.9
  x_s, noise = jnp.full((1, 1), 0.6), jnp.full((1, 1), -0.4)

  def field(x, sigma):
    return 0.7 * x - 0.2 + 0.5 * sigma[:, None]

  def value(z1, z2, two_sample):
    paths = jnp.float32([z1, z2]).reshape(2, 1, 1, 1)
    _, parts = losses.ambient_fake_score_loss(
      field, x_s, s, t, noise, consistency_weight=1.0, steps_back=jnp.full((1, 1), back),
      transition_noise=paths, eta=eta, two_sample=two_sample,
    )  # fmt: skip
    return float(parts["consistency"])

  signs = [(a, b) for a in (-1, 1) for b in (-1, 1)]
  x_t = renoise(x_s, noise, s, t)
  level, lower = jnp.float32([t]), jnp.float32([t - back])
  mean_x = cps_step(x_t, field(x_t, level), t, t - back, eta, 0.0)
  bias = x0_from_v(mean_x, field(mean_x, lower), lower) - x0_from_v(x_t, field(x_t, level), level)
  squared = float(bias[0, 0]) ** 2
  assert np.mean([value(a, b, True) for a, b in signs]) == pytest.approx(squared, rel=1e-4)
  variance = ((1 - 0.7 * (t - back)) * (t - back) * np.sin(eta * np.pi / 2)) ** 2
  one_sample = np.mean([value(a, b, False) for a, b in signs])
  assert one_sample == pytest.approx(squared + variance, rel=1e-4)


def test_exact_posterior_mean_is_consistent():
  """Both ends drawn from the true posterior of x_r given x_t: the estimate averages to 0."""
  mu, var, t, r = 0.4, 0.6, 0.8, 0.5

  def posterior_mean(x, level):
    gain = (1 - level) * var / ((1 - level) ** 2 * var + level**2)
    return mu + gain * (x - (1 - level) * mu)

  var_t, var_r = ((1 - q) ** 2 * var + q**2 for q in (t, r))
  a = (1 - t) / (1 - r)  # x_t = a x_r + independent noise
  x_t = jnp.full((1, 1), 1.3)
  mean = (1 - r) * mu + a * var_r / var_t * (x_t - (1 - t) * mu)
  std = np.sqrt(var_r - (a * var_r) ** 2 / var_t)
  anchor = posterior_mean(x_t, t)
  values = [
    losses.consistency_loss(
      anchor, posterior_mean(mean + std * z1, r), posterior_mean(mean + std * z2, r)
    )
    for z1 in (-1, 1)
    for z2 in (-1, 1)
  ]
  assert np.mean(values) == pytest.approx(0, abs=1e-6) and np.abs(values).max() > 1e-2


def test_point_mass_has_no_consistency_violation():
  mu = 0.3
  total, parts = losses.ambient_fake_score_loss(
    lambda x, sigma: (x - mu) / sigma[:, None], (1 - 0.5) * mu + 0.5 * X.reshape(2, 4), 0.5, 0.9,
    NOISE.reshape(2, 4), consistency_weight=1.0, steps_back=np.full((1, 2), 0.2, np.float32),
    transition_noise=PATHS[:, :1].reshape(2, 1, 2, 4),
  )  # fmt: skip
  assert parts["consistency"] == pytest.approx(0, abs=1e-10)
  assert total >= parts["fake_score"] - 1e-9
