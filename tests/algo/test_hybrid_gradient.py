"""The policy term plus the deterministic last step is the gradient of the expected reward."""

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.algo import losses
from rtdmd_jax.algo.rollout import sample_rollout
from rtdmd_jax.algo.transitions import cps_gaussian_log_prob, cps_mean, cps_std, x0_from_v

SIGMAS = np.array([1.0, 0.8, 0.5, 0.0])
ETA = 0.9
TARGET = 0.7
THETA = np.array([-0.3, 0.2])


def velocity(theta):
  return lambda x, sigma: theta[0] * x + theta[1]


def reward(x0):
  return 2.0 - jnp.square(x0[:, 0] - TARGET)


def expected_reward(theta):
  """Exact, in float64: every step of the policy is linear, so x0 stays Gaussian."""
  mean, var = 0.0, 1.0
  for s, r in zip(SIGMAS[:-1], SIGMAS[1:], strict=True):
    # x' = (1 - r)(x - s v) + r cos (x + (1 - s) v) + r sin z
    cos, sin = np.cos(ETA * np.pi / 2), np.sin(ETA * np.pi / 2)
    on_x, on_v = (1 - r) + r * cos, -s * (1 - r) + r * cos * (1 - s)
    mean, var = on_x * mean + on_v * (theta[0] * mean + theta[1]), var
    var = (on_x + on_v * theta[0]) ** 2 * var + (r * sin) ** 2
  return 2.0 - (var + (mean - TARGET) ** 2)


def test_hybrid_gradient_matches_finite_differences():
  n = 200_000
  keys = jax.random.split(jax.random.key(5), 2)
  noise, step_noise = jax.random.normal(keys[0], (n, 1)), jax.random.normal(keys[1], (3, n, 1))
  sigmas = jnp.asarray(SIGMAS, jnp.float32)
  path = sample_rollout(velocity(THETA), noise, sigmas, step_noise, eta=ETA)
  rewards = reward(path.x_next[-1])
  advantage = rewards - rewards.mean()

  def objective(theta):
    total = 0.0
    for i in range(2):
      v = velocity(theta)(path.x[i], sigmas[i])
      mean = cps_mean(path.x[i], v, sigmas[i], sigmas[i + 1], ETA)
      log_prob = cps_gaussian_log_prob(path.x_next[i], mean, cps_std(sigmas[i + 1], ETA))
      old = jax.lax.stop_gradient(log_prob)
      total += losses.clipped_policy_loss(
        log_prob, old, advantage, clip_low=1e-5, clip_high=1e-5, limit=1e6
      )
    last = x0_from_v(path.x[2], velocity(theta)(path.x[2], sigmas[2]), sigmas[2])
    return total + losses.reward_hinge(reward(last), 3.0)

  estimate = -np.asarray(jax.jit(jax.grad(objective))(jnp.asarray(THETA, jnp.float32)))
  h = 1e-5
  exact = [
    (expected_reward(THETA + h * e) - expected_reward(THETA - h * e)) / (2 * h) for e in np.eye(2)
  ]
  np.testing.assert_allclose(rewards.mean(), expected_reward(THETA), atol=0.02)
  np.testing.assert_allclose(estimate, exact, atol=0.03)
  # Neither term alone would do.
  assert np.abs(exact).max() > 0.3


def test_shared_noise_lowers_the_variance_of_the_policy_gradient():
  """For a linear reward: sharing the untrained step's noise keeps the mean, lowers the variance."""
  groups, repeats = 4000, 8
  keys = jax.random.split(jax.random.key(9), 4)
  noise = jax.random.normal(keys[0], (groups, repeats, 1))
  own = jax.random.normal(keys[1], (2, groups, repeats, 1))
  shared = jnp.broadcast_to(jax.random.normal(keys[2], (groups, 1, 1)), (groups, repeats, 1))
  sigmas = jnp.asarray(SIGMAS, jnp.float32)
  std = cps_std(sigmas[1], ETA)

  def group_gradients(untrained):
    step_noise = jnp.stack([own[0], untrained, 0 * untrained]).reshape(3, -1, 1)
    path = sample_rollout(velocity(THETA), noise.reshape(-1, 1), sigmas, step_noise, eta=ETA)
    rewards = path.x_next[-1].reshape(groups, repeats)
    advantage = rewards - rewards.mean(axis=1, keepdims=True)
    # d log p / d mean of the trained first step, up to a constant
    score = (step_noise[0] / std).reshape(groups, repeats)
    return np.asarray(jnp.mean(advantage * score, axis=1))

  independent, common = group_gradients(own[1]), group_gradients(shared)
  assert common.var() < 0.9 * independent.var()
  error = np.sqrt((common.var() + independent.var()) / groups)
  assert abs(common.mean() - independent.mean()) < 4 * error
