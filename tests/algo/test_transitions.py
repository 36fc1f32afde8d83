import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.algo import transitions as tr
from tests.support.algo_inputs import NOISE, S, T, V, X


def recorded(actual, expected):
  np.testing.assert_allclose(np.ravel(actual), expected, rtol=2e-5, atol=2e-6)


def test_cps_step_recorded():
  recorded(
    tr.cps_step(X, V, T, S, 0.9, NOISE),
    [0.4891045, -1.3332934, 0.9289311, 0.3077685, -0.571391, -0.3018327, 0.214885, -0.2050054],
  )


def test_renoise_recorded():
  recorded(
    tr.renoise(X, NOISE, S, T),
    [0.3136492, -1.0609475, 1.1720564, -0.2311088, -0.5879391, -0.1175736, 0.1915432, 0.0702945],
  )


def test_ambient_target_recorded():
  target, scale = tr.ambient_target(X, NOISE, S, T, scale_out=False)
  recorded(
    target,
    [-0.2772514, 1.4317544, -0.1799061, -0.651848, -8.9698486, 1.706066, 4.9788585, -2.8242643],
  )
  recorded(scale, [1, 1])
  target, scale = tr.ambient_target(X, NOISE, S, T, scale_out=True)
  recorded(
    target,
    [-0.214758, 1.1090322, -0.1393547, -0.5049194, -7.6111689, 1.4476449, 4.2247009, -2.3964677],
  )
  recorded(scale, [0.7745967, 0.8485281])
  assert (scale * V).shape == V.shape


def test_sde_recorded():
  """Levels 1 -> .9 and .9 -> .75 with a = .7; the second level stands in at sigma 1."""
  args = (X, V, np.float32([1.0, 0.9]), np.float32([0.9, 0.75]), 0.7)
  recorded(
    tr.sde_step(*args, NOISE, sigma_max=0.9),
    [0.4515, -1.5009999, 1.3540001, -0.0595, -0.2646069, -0.3804087, 0.0154371, -0.0259402],
  )
  mean, std = tr.sde_mean_and_std(*args, sigma_max=0.9)
  recorded(mean, [0.2765, -0.976, 0.5840001, 0.1855, 0.8740501, -0.421075, -0.5132251, 0.1367251])
  recorded(std, [2.2135942 * np.sqrt(0.1), 2.0999999 * np.sqrt(0.15)])
  recorded(tr.sde_log_prob(X * 0.9 + 0.05, *args, sigma_max=0.9), [-0.5728438, -0.817251])


def test_cps_log_prob_recorded():
  mean = tr.cps_mean(X, V, np.float32([1.0, 0.9]), np.float32([0.9, 0.75]), 0.7)
  recorded(
    mean,
    [0.2025774, -0.6803098, 0.3868732, 0.1608592, 0.809359, -0.4080528, -0.4741584, 0.1060598],
  )
  recorded(tr.cps_std(np.float32([0.9, 0.75]), 0.7), [0.8019059, 0.6682549])
  recorded(tr.cps_log_prob(X * 0.9 + 0.05, mean), [-0.0708232, -0.1685936])


@pytest.mark.parametrize(("next_sigma", "eta"), [(0.4, 0.0), (0.0, 0.9)])
def test_deterministic_moves_are_euler_steps(next_sigma, eta):
  expected = X + (next_sigma - 0.75) * V
  np.testing.assert_allclose(
    tr.cps_step(X, V, 0.75, next_sigma, eta, NOISE), expected, rtol=1e-5, atol=1e-6
  )


def test_full_stochasticity_redraws_the_noise():
  expected = 0.6 * tr.x0_from_v(X, V, 0.75) + 0.4 * NOISE
  np.testing.assert_allclose(tr.cps_step(X, V, 0.75, 0.4, 1.0, NOISE), expected, atol=1e-6)


def test_conversions():
  x = tr.add_noise(X, NOISE, S)
  v = NOISE - X
  np.testing.assert_allclose(tr.x0_from_v(x, v, S), X, atol=1e-6)
  np.testing.assert_allclose(tr.eps_from_v(x, v, S), NOISE, atol=1e-6)


def test_cps_preserves_the_marginal_of_a_point_mass():
  """With the exact velocity of a point mass, x' is exactly (1 - s') x0 + s' N(0, 1)."""
  x0, eps, z = 0.7, jnp.float32([[1.0], [-1.0], [1.0], [-1.0]]), jnp.float32([[1, 1, -1, -1]]).T
  x = tr.add_noise(jnp.full((4, 1), x0), eps, 0.8)
  out = tr.cps_step(x, eps - x0, 0.8, 0.5, 0.9, z)
  np.testing.assert_allclose(out.mean(), 0.5 * x0, atol=1e-6)
  np.testing.assert_allclose(out.std(), 0.5, atol=1e-6)


def linear_in(function):
  """Coefficients of x_s and of the noise in a map that is linear in both."""
  one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
  return float(function(one, zero)[0, 0]), float(function(zero, one)[0, 0])


@pytest.mark.parametrize(("s", "t"), [(0.5, 0.7), (0.9, 0.98), (0.0, 0.3), (0.75, 0.751)])
def test_renoise_keeps_the_marginal(s, t):
  a, w = linear_in(lambda x, n: tr.renoise(x, n, s, t))
  mu, var = 0.8, 2.3
  assert a * (1 - s) * mu == pytest.approx((1 - t) * mu, rel=1e-5)
  before = (1 - s) ** 2 * var + s**2
  assert a**2 * before + w**2 == pytest.approx((1 - t) ** 2 * var + t**2, rel=1e-5)


@pytest.mark.parametrize("scale_out", [True, False])
@pytest.mark.parametrize(("s", "t"), [(0.5, 0.7), (0.9, 0.97), (0.0, 0.3)])
def test_ambient_minimiser_is_the_exact_velocity(s, t, scale_out):
  """Least squares of target / scale on x_t, for x0 ~ N(mu, var), gives E[eps - x0 | x_t]."""
  mu, var = -0.6, 0.4
  a, w = linear_in(lambda x, n: tr.renoise(x, n, s, t))
  c, d = linear_in(lambda x, n: jnp.divide(*tr.ambient_target(x, n, s, t, scale_out=scale_out)))
  var_s, mean_s = (1 - s) ** 2 * var + s**2, (1 - s) * mu
  slope = (a * c * var_s + w * d) / (a**2 * var_s + w**2)
  intercept = c * mean_s - slope * a * mean_s

  exact_slope = (t - (1 - t) * var) / ((1 - t) ** 2 * var + t**2)
  assert slope == pytest.approx(exact_slope, rel=1e-3, abs=1e-4)
  assert intercept == pytest.approx(-mu - exact_slope * (1 - t) * mu, rel=1e-3, abs=1e-4)


def test_ambient_target_at_zero_is_flow_matching():
  target, scale = tr.ambient_target(X, NOISE, 0.0, T, scale_out=True)
  np.testing.assert_allclose(target / scale, NOISE - X, rtol=1e-5)


def test_variance_floor_when_the_level_falls_below_the_start():
  assert np.all(np.isfinite(tr.renoise(X, NOISE, 0.985, 0.98)))


def test_gaussian_log_prob_is_a_density_and_its_gradient_ignores_the_sample():
  std = np.float32([0.3, 0.5])
  mean = V
  expected = [
    sum(-0.5 * ((x - m) / q) ** 2 - np.log(q) - 0.5 * np.log(2 * np.pi) for x, m in pairs)
    for q, pairs in (
      (std[i], list(zip(X[i].ravel(), mean[i].ravel(), strict=True))) for i in range(2)
    )
  ]
  np.testing.assert_allclose(tr.cps_gaussian_log_prob(X, mean, std), expected, rtol=1e-5)
  np.testing.assert_allclose(
    tr.cps_gaussian_log_prob(X, mean, std, reduction="mean"), np.divide(expected, 4), rtol=1e-5
  )
  for log_prob in (tr.cps_log_prob, lambda x, m: tr.cps_gaussian_log_prob(x, m, std)):
    grads = jax.grad(lambda x, m, f=log_prob: f(x, m).sum(), argnums=(0, 1))(X, mean)
    assert not np.any(grads[0]) and np.all(grads[1] != 0)
  with pytest.raises(ValueError, match="median"):
    tr.cps_gaussian_log_prob(X, mean, std, reduction="median")


@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 4, 4, 3)])
def test_scalar_and_batched_levels_agree_and_jit(shape):
  keys = jax.random.split(jax.random.key(0), 3)
  x, v, n = (jax.random.normal(k, shape) for k in keys)
  calls = {
    "cps": lambda s, t: tr.cps_step(x, v, t, s, 0.9, n),
    "sde": lambda s, t: tr.sde_log_prob(n, x, v, t, s, 0.7, sigma_max=0.9),
    "renoise": lambda s, t: tr.renoise(x, n, s, t),
    "target": lambda s, t: tr.ambient_target(x, n, s, t, scale_out=True)[0],
    "add": lambda s, t: tr.add_noise(x, n, t),
  }
  for name, call in calls.items():
    scalar = call(0.5, 0.8)
    batched = jax.jit(call)(jnp.full((2,), 0.5), jnp.full((2,), 0.8))
    np.testing.assert_allclose(scalar, batched, rtol=1e-5, atol=1e-6, err_msg=name)
    assert batched.dtype == jnp.float32
  noise = jnp.float32([1.0, 2.0])
  np.testing.assert_allclose(
    tr.renoise(x, noise, 0.5, 0.8), tr.renoise(x, tr.expand(noise, x) + 0 * x, 0.5, 0.8)
  )


def test_low_precision_inputs_are_computed_in_float32():
  x = jnp.asarray(X, jnp.bfloat16)
  out = tr.cps_step(x, x, 0.9, 0.75, 0.9, x)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(
    out, tr.cps_step(x.astype(jnp.float32), x.astype(jnp.float32), 0.9, 0.75, 0.9, x), atol=1e-7
  )


def test_wrong_batch_is_named():
  with pytest.raises(ValueError, match=r"\(3,\)"):
    tr.renoise(X, NOISE, np.zeros(3), T)
