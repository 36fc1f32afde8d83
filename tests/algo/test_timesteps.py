import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.algo import timesteps as ts

KEY = jax.random.key(3)
N = 20000


def test_renoise_interval_and_point_mass():
  t = np.asarray(ts.renoise_sigma(KEY, 0.9, N)) * 1000
  assert t.min() >= 910 and t.max() == pytest.approx(980)
  # Uniform on [910, 1000]: 20 / 90 of the draws are clamped.
  assert np.mean(t > 979.999) == pytest.approx(20 / 90, abs=0.012)
  inside = t[t < 979.999]
  assert inside.mean() == pytest.approx(945, abs=0.5)


@pytest.mark.parametrize(("s", "share"), [(0.9581, 0.63), (0.9674, 0.88)])
def test_point_mass_of_flux2(s, share):
  t = np.asarray(ts.renoise_sigma(KEY, s, N)) * 1000
  assert np.mean(t > 979.999) == pytest.approx(share, abs=0.015)


def test_renoise_low_clamp_and_full_interval():
  t = np.asarray(ts.renoise_sigma(KEY, 0.0, N)) * 1000
  assert t.min() == pytest.approx(20) and t.mean() == pytest.approx(505, abs=6)


def test_renoise_empty_interval():
  # 1000 s + 10 = 950 passes the end: uniform on [950, 951].
  t = np.asarray(ts.renoise_sigma(KEY, 0.94, N, end=900.0)) * 1000
  assert 949.99 <= t.min() and t.max() <= 951.01 and t.std() == pytest.approx(12**-0.5, abs=0.01)
  # Above the clamp the level falls below s.
  assert np.all(np.asarray(ts.renoise_sigma(KEY, 0.99, 16)) < 0.99)


@pytest.mark.parametrize("s", [0.0, 0.5, 0.9674, 0.985, 0.995])
def test_inside_is_strictly_inside_without_point_mass(s):
  t = np.asarray(ts.renoise_sigma(KEY, s, N, inside=True), np.float64)
  assert np.all((t > s) & (t < 1))
  start = s + 0.01 if s + 0.01 < 1 else s
  assert np.mean(t > 0.5 * (start + 1)) == pytest.approx(0.5, abs=0.015)


def test_renoise_is_per_sample():
  s = jnp.float32([0.9, 0.0, 0.5])
  t = jax.jit(lambda k, s: ts.renoise_sigma(k, s, 3))(KEY, s)
  for i in range(3):
    np.testing.assert_allclose(t[i], ts.renoise_sigma(KEY, s[i], 3)[i], rtol=1e-6)


def test_logit_normal_quantiles():
  t = np.sort(np.asarray(ts.logit_normal_sigma(KEY, N, mean=0.5, std=0.8)))
  z = np.array([-1.0, 0.0, 1.0])
  ranks = (N * np.array([0.158655, 0.5, 0.841345])).astype(int)
  np.testing.assert_allclose(t[ranks], 1 / (1 + np.exp(-(0.5 + 0.8 * z))), atol=0.01)


def test_uniform_range_and_shift():
  raw = ts.uniform_sigma(KEY, N, low=20, high=980)
  assert 0.02 <= raw.min() and raw.max() <= 0.98 and raw.mean() == pytest.approx(0.5, abs=0.01)
  shifted = ts.uniform_sigma(KEY, N, low=20, high=980, shift=3.0)
  np.testing.assert_allclose(shifted, 3 * raw / (1 + 2 * raw), rtol=1e-5)


def test_consistency_steps_cover_1_to_epsilon():
  delta = np.asarray(ts.consistency_steps(KEY, 2, N, epsilon=5)) * 1000
  assert delta.shape == (2, N)
  np.testing.assert_allclose(np.unique(delta.round(3)), [1, 2, 3, 4, 5])
  assert not np.array_equal(delta[0], delta[1])


def test_adjacent_steps_land_on_the_schedule():
  sigmas = jnp.float32([1.0, 0.9, 0.75, 0.5, 0.0])
  level = jnp.float32([0.95, 0.75, 0.3])
  delta = ts.adjacent_steps(level, sigmas, 3)
  path = level[None] - jnp.cumsum(delta, axis=0)
  np.testing.assert_allclose(path, [[0.9, 0.5, 0.0], [0.75, 0, 0], [0.5, 0, 0]], atol=1e-6)


def test_stop_and_guidance():
  stops = jax.vmap(lambda k: ts.random_stop(k, 4))(jax.random.split(KEY, 4000))
  np.testing.assert_allclose(np.bincount(stops, minlength=5) / 4000, [0] + [0.25] * 4, atol=0.03)
  g = jax.vmap(lambda k: ts.guidance_scale(k, 3.0, 7.0))(jax.random.split(KEY, 4000))
  assert g.min() >= 3 and g.max() <= 7 and g.mean() == pytest.approx(5, abs=0.1)
  assert ts.guidance_scale(KEY, 4.5, 4.5) == 4.5


@pytest.mark.parametrize(
  "draw",
  [
    lambda i: ts.renoise_sigma(KEY, 0.5, i),
    lambda i: ts.uniform_sigma(KEY, i),
    lambda i: ts.logit_normal_sigma(KEY, i),
    lambda i: ts.consistency_steps(KEY, 3, i).T,
  ],
)
def test_draws_by_index_do_not_depend_on_the_batch(draw):
  whole = draw(jnp.arange(6))
  np.testing.assert_array_equal(draw(jnp.array([4, 1])), whole[jnp.array([4, 1])])
  assert len(np.unique(np.asarray(whole).reshape(6, -1), axis=0)) == 6
