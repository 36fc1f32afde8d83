"""The yardsticks of benchmarks/tilt against Monte Carlo and quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.tilt import estimators, optimum, run, teachers, training
from rtdmd_jax.training.settings import Consistency

MIXTURE = teachers.MIXTURE
GRID = optimum.Grid(side=60)
LINEAR, QUADRATIC = np.array([0.4, 1.4]), 1.0


@pytest.mark.parametrize("sigma", [0.3, 0.7])
def test_velocity_is_the_conditional_mean(sigma):
  prior, x = GRID.law(MIXTURE), np.array([[0.2, -0.4], [-0.8, 0.5]])
  eps = (x[:, None, None] - (1 - sigma) * GRID.points) / sigma
  weight = prior * np.exp(-0.5 * np.square(eps).sum(-1))
  weight /= weight.sum((1, 2), keepdims=True)
  expected = np.einsum("nij,nijd->nd", weight, eps - GRID.points)
  got = teachers.velocity(teachers.spectral(MIXTURE), jnp.asarray(x), jnp.full(2, sigma))
  np.testing.assert_allclose(got, expected, atol=2e-3)


def test_tilted_law_is_the_product():
  b = 0.6
  reward = GRID.points @ LINEAR - 0.5 * QUADRATIC * np.square(GRID.points).sum(-1)
  expected = GRID.law(MIXTURE) * np.exp(b * reward)
  got = GRID.law(teachers.tilt(MIXTURE, b, LINEAR, QUADRATIC))
  np.testing.assert_allclose(got, expected / expected.sum(), atol=1e-8)


def test_distance_of_exact_samples_is_the_floor_and_of_others_the_exact_one():
  x = teachers.sample(MIXTURE, 4000, np.random.default_rng(0))
  floor = teachers.mmd_floor(MIXTURE, 4000)
  assert 0.5 * floor < teachers.mmd(x, MIXTURE) < 1.6 * floor
  other = teachers.tilt(MIXTURE, 0.5, LINEAR, QUADRATIC)
  assert teachers.mmd(x, other) == pytest.approx(teachers.mixture_mmd(MIXTURE, other), abs=floor)
  assert teachers.mixture_mmd(MIXTURE, other) > 5 * floor


def test_grid_optimum_of_a_gaussian_is_the_closed_form():
  config, linear, beta = training.MATCHING, np.array([0.8, 0.6]), 0.2
  cov = teachers.GAUSSIAN["covs"][0]
  shift = optimum.gaussian_shift(cov, linear, config, 1.0, beta)
  grid = optimum.Grid(side=40)
  reward = grid.points @ linear
  law = optimum.grid_optimum(teachers.GAUSSIAN, reward, config, 1.0, beta, grid, nodes=40)
  mean = np.einsum("ij,ijd->d", law, grid.points)
  gap = grid.points - mean
  np.testing.assert_allclose(mean - teachers.GAUSSIAN["means"][0], shift, rtol=0.05)
  np.testing.assert_allclose(np.einsum("ij,ija,ijb->ab", law, gap, gap), cov, atol=0.05)


def test_the_ratio_that_trains_is_one_in_bfloat16_though_programs_differ():
  problem = training.Problem(MIXTURE, LINEAR, QUADRATIC)
  state = training.start(problem, training.Training(1))
  last = jax.random.normal(jax.random.key(0), state.ema["layer3"]["kernel"].shape)
  state = state.replace(ema=state.ema | {"layer3": {"kernel": 0.1 * last, "bias": jnp.ones(2)}})
  found = estimators.half_precision(problem, state, images=128)
  assert all(row["loss"] == -1.0 for row in found["rows"])
  drift = {row["dtype"]: row["drift"] for row in found["rows"]}
  assert drift["float32"] < found["clip"] < drift["bfloat16"]


def test_the_estimators_are_unbiased():
  problem = training.Problem(MIXTURE, LINEAR, QUADRATIC)
  ambient = estimators.ambient(problem.teacher, count=20_000)
  assert all(0.7 < level["chi2_per_cell"] < 1.4 for level in ambient["levels"])
  found = estimators.consistency(problem.teacher, anchors=64, paths=1024)["offset_velocity"]
  gap = found["two_sample"] - found["squared_violation"]
  assert abs(gap) < 3 * found["two_sample_error"] < 0.1 * found["one_sample"]


def test_a_section_of_results_is_rows_with_their_part():
  section = {"floor": 0.5, "stage1": {"mmd": 1.0}, "stage2": [{"beta": 1}, {"beta": 2}]}
  assert run.rows_of(section) == [
    {"part": "floor", "value": 0.5},
    {"part": "stage1", "mmd": 1.0},
    {"part": "stage2", "beta": 1},
    {"part": "stage2", "beta": 2},
  ]


@pytest.mark.slow
def test_a_short_cold_start_approaches_the_gaussian():
  problem = training.Problem(teachers.GAUSSIAN, np.array([0.8, 0.6]), 0.0)
  fixed, settings = training.frozen(problem), training.Training(400, 3e-3, 3e-3, 5)
  config = training.MATCHING._replace(normalize=True, consistency=Consistency(weight=0.0))
  before = teachers.mmd(training.path({}, fixed, 4000)[-1], problem.teacher)
  state = training.train_stage1(
    training.start(problem, settings), fixed, training=settings, config=config
  )
  after = teachers.mmd(training.path(state.ema, fixed, 4000)[-1], problem.teacher)
  assert before > 0.15 and after < before / 2
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(state.ema))
