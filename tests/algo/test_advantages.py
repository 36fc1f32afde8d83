import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.algo.advantages import group_advantages, signal_mask

A = np.float32([0.1, 0.5, 0.9, 0.2, 0.2, 0.8, 1.1, 0.3])
B = np.float32([3, 1, 2, 5, 5, 5, 0, 4])
IDS = np.array([70, -3, 70, -3, 11, 11, 70, -3])
REWARDS = {"a": A, "b": B, "mean": A + B}
WEIGHTS = {"a": 1.0, "b": 0.5}

# (global_std, weight_advantages) -> numbers recorded from the published code.
RECORDED = {
  (True, True): [-1.852788, -0.224337, 0.910408, 0.104175, -1.177375, 1.177375, 0.942381, 0.120162],
  (False, True): [
    -1.22129,
    0.928014,
    0.853004,
    -0.826552,
    -1.429724,
    1.429724,
    0.368286,
    -0.101462,
  ],
  (True, False): [0.087012, -1.30518, 0.478566, 0.913626, -0.391554, 0.391554, -0.565578, 0.391554],
  (False, False): [0.201969, -1.377756, 1.110831, 0.964429, -0.999667, 0.999667, -1.3128, 0.413327],
}


@pytest.mark.parametrize(("global_std", "weight_advantages"), RECORDED)
def test_recorded(global_std, weight_advantages):
  out = jax.jit(
    lambda r, i: group_advantages(
      r, i, WEIGHTS, global_std=global_std, weight_advantages=weight_advantages
    )
  )(REWARDS, IDS)
  np.testing.assert_allclose(out, RECORDED[global_std, weight_advantages], atol=2e-5)


def test_without_groups():
  out = group_advantages(REWARDS, IDS, {"a": 1.0}, per_prompt=False, weight_advantages=False)
  np.testing.assert_allclose(out, (A - A.mean()) / (A.std() + 1e-4), atol=1e-5)


@pytest.mark.parametrize("global_std", [True, False])
def test_random_groups_against_a_plain_loop(global_std):
  rng = np.random.default_rng(0)
  ids, reward = rng.integers(0, 6, 40), rng.normal(3, 2, 40).astype(np.float32)
  expected = np.zeros(40)
  for prompt in set(ids):
    own = reward[ids == prompt]
    std = reward.std() if global_std else own.std()
    expected[ids == prompt] = (own - own.mean()) / (std + 1e-4)
  out = group_advantages(
    {"r": reward}, ids, {"r": 1.0}, global_std=global_std, weight_advantages=False
  )
  np.testing.assert_allclose(out, expected, atol=2e-5)


@pytest.mark.parametrize("weight_advantages", [True, False])
def test_missing_rewards_are_left_out_of_the_statistics(weight_advantages):
  reward = A.copy()
  reward[2] = np.nan
  keep = np.arange(8) != 2
  options = {"weight_advantages": weight_advantages}
  out = np.asarray(group_advantages({"a": reward}, IDS, {"a": 1.0}, **options))
  assert out[2] == 0
  rest = group_advantages({"a": A[keep]}, IDS[keep], {"a": 1.0}, **options)
  np.testing.assert_allclose(out[keep], rest, atol=1e-5)


def test_one_missing_reward_leaves_the_other():
  reward = A.copy()
  reward[IDS == 11] = np.nan  # a reward that does not apply to this prompt
  out = group_advantages({"a": reward, "b": IDS * 0.0 + np.arange(8)}, IDS, WEIGHTS)
  assert np.all(np.isfinite(out)) and out[4] < out[5]


def test_signal_mask():
  rewards = {
    "a": np.float32([1, 1, 1, 2, 0.1, 0.1, 5, np.nan]),
    "b": np.float32([3, 3, 0, 0, 0, 0, 1, 2]),
  }
  ids = np.array([0, 0, 1, 1, 2, 2, 3, 3])
  both = jax.jit(lambda r: signal_mask(r, ids, {"a": 1.0, "b": 1.0}))(rewards)
  np.testing.assert_array_equal(both, [0, 0, 1, 1, 0, 0, 1, 1])
  np.testing.assert_array_equal(
    signal_mask(rewards, ids, {"a": 1.0, "b": 0.0}), [0, 0, 1, 1, 0, 0, 0, 0]
  )
  # The second centring would have hidden the flat groups.
  out = group_advantages(rewards, ids, {"a": 1.0, "b": 1.0})
  assert np.all(np.isfinite(out)) and out[7] != 0


def test_a_flat_batch_has_no_advantage():
  out = group_advantages({"r": jnp.full((6,), 2.0)}, jnp.arange(6) // 3, {"r": 1.0})
  np.testing.assert_array_equal(out, np.zeros(6))


def test_weights_need_rewards():
  with pytest.raises(ValueError, match="ocr"):
    group_advantages(REWARDS, IDS, {"ocr": 1.0})
  with pytest.raises(ValueError):
    group_advantages(REWARDS, IDS, {})


@pytest.mark.parametrize("weight_advantages", [True, False])
def test_a_reward_of_weight_zero_may_fail(weight_advantages):
  values = jnp.array([0.0, 1.0, 3.0, 2.0, 5.0, 1.0])
  ids = jnp.array([0, 0, 0, 1, 1, 1])
  broken = {"a": values, "b": jnp.full(6, jnp.nan)}
  options = {"weight_advantages": weight_advantages}
  alone = group_advantages({"a": values}, ids, {"a": 1.0}, **options)
  both = group_advantages(broken, ids, {"a": 1.0, "b": 0.0}, **options)
  np.testing.assert_allclose(both, alone, atol=1e-6)
  # The other way round, the sample that only a weightless reward scored does not count.
  partly = values.at[2].set(jnp.nan)
  alone = group_advantages({"a": partly}, ids, {"a": 1.0}, **options)
  both = group_advantages({"a": partly, "b": values}, ids, {"a": 1.0, "b": 0.0}, **options)
  np.testing.assert_allclose(both, alone, atol=1e-6)
  assert both[2] == 0.0


def test_signal_and_advantage_share_their_baseline():
  """Constant groups around the batch's mean: all samples have signal, and advantages sum to 0."""
  ids = jnp.array([0, 0, 1, 1])
  rewards = {"a": jnp.array([1.0, 1.0, 0.0, 0.0])}
  settings = dict(per_prompt=False)
  mask = signal_mask(rewards, ids, {"a": 1.0}, **settings)
  advantages = group_advantages(rewards, ids, {"a": 1.0}, **settings)
  assert mask.all() and abs(float(advantages.sum())) < 1e-5
  assert not signal_mask(rewards, ids, {"a": 1.0}).any()
  # Two rewards whose sum is the same everywhere.
  both = {"a": rewards["a"], "b": 1.0 - rewards["a"]}
  mask = signal_mask(both, ids, {"a": 1.0, "b": 1.0}, per_prompt=False, weight_advantages=False)
  assert not mask.any()


def test_values_whose_squares_overflow_are_left_out():
  ids, weights = jnp.array([0, 0, 0, 0]), {"a": 1.0}
  absurd = {"a": jnp.array([0.0, 1.0, 2.0, 1e30])}
  missing = {"a": jnp.array([0.0, 1.0, 2.0, jnp.nan])}
  np.testing.assert_array_equal(
    group_advantages(absurd, ids, weights), group_advantages(missing, ids, weights)
  )
