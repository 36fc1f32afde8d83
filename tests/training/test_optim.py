import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.config import load_config
from rtdmd_jax.training.optim import ema_update, guarded_update, make_optimizer, repeated_update
from rtdmd_jax.training.settings import OptimizerConfig
from rtdmd_jax.training.stages import finish_program
from rtdmd_jax.training.state import TrainState
from tests.support.paths import CONFIGS


def test_the_first_adam_step_is_the_learning_rate_in_the_gradient_s_direction():
  optimizer = make_optimizer(OptimizerConfig(0.1, eps=0.0, clip_norm=1e9))
  params = {"b": jnp.array([1.0, -2.0])}
  new, _, info = guarded_update(
    optimizer, {"b": jnp.array([3.0, -4.0])}, optimizer.init(params), params
  )
  np.testing.assert_allclose(new["b"], [0.9, -1.9], atol=1e-6)
  assert float(info["grad_norm"]) == 5.0
  assert float(info["skipped"]) == 0.0


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_non_finite_gradient_changes_neither_parameters_nor_state(bad):
  optimizer = make_optimizer(OptimizerConfig(0.1))
  params = {"a": jnp.ones(2), "b": jnp.ones(2)}
  state = optimizer.init(params)
  grads = {"a": jnp.ones(2), "b": jnp.array([1.0, bad])}
  new, new_state, info = guarded_update(optimizer, grads, state, params)
  jax.tree.map(np.testing.assert_array_equal, (params, state), (new, new_state))
  assert float(info["skipped"]) == 1.0


def test_warm_up_starts_at_zero():
  optimizer = make_optimizer(OptimizerConfig(0.1, warmup_steps=2, eps=0.0))
  params = {"b": jnp.ones(1)}
  state = optimizer.init(params)
  moved = []
  for _ in range(3):
    new, state, _ = guarded_update(optimizer, {"b": jnp.ones(1)}, state, params)
    moved.append(float(params["b"][0] - new["b"][0]))
    params = new
  np.testing.assert_allclose(moved, [0.0, 0.05, 0.1], atol=1e-6)


def test_moving_average_moves_only_when_told():
  ema, params = {"b": jnp.zeros(2)}, {"b": jnp.ones(2)}
  np.testing.assert_allclose(ema_update(ema, params, 0.9)["b"], 0.1, rtol=1e-6)
  np.testing.assert_array_equal(ema_update(ema, params, 0.9, jnp.array(False))["b"], 0.0)


def _our_averages(config, weights):
  """The moving average after each step, of parameters that are `weights[n]` after n steps."""
  program = finish_program(load_config(str(CONFIGS / config)).ema)
  finish, start = program.compile(seed=0), jnp.float32(weights[0])
  state = TrainState(jnp.int32(0), {"b": start}, {}, {"b": start}, {}, {})
  found = []
  for value in weights[1:]:
    state = finish(state.replace(generator={"b": jnp.float32(value)}))
    found.append(float(state.ema["b"]))
  return found


def test_stage_2_averages_as_the_published_loop():
  weights = np.random.default_rng(0).normal(size=121).cumsum()
  average, step, published = weights[0], 0, []
  for _ in range(120):  # epochs of 16 parts, with the one optimizer step in the last
    for part in range(16):
      step += part == 15
      if (step + 1) % 8 == 0:
        decay = min((1 + step) / (10 + step), 0.9)
        average += (1 - decay) * (weights[step] - average)
    published.append(average)
  ours = _our_averages("sd35_stage2.py", weights)
  # Its 16 applications begin in the part that ends step 7 and end in the epoch of step 8.
  begun = np.arange(1, 121) % 8 == 7
  np.testing.assert_allclose(np.array(ours)[~begun], np.array(published)[~begun], rtol=1e-5)
  np.testing.assert_allclose(np.array(ours)[begun], published[7::8], rtol=1e-5)
  # Warm: 0.9 to the 16th. After the first eight steps next to nothing of the start is left.
  assert ours[6] == pytest.approx(weights[7], abs=1e-4 * abs(weights[7] - weights[0]))
  kept = (ours[110] - weights[111]) / (ours[109] - weights[111])
  assert kept == pytest.approx(0.9**16, rel=1e-3)


def test_stage_1_averages_at_every_step_without_warm_up():
  weights = np.random.default_rng(1).normal(size=41).cumsum()
  average, published = weights[0], []
  for value in weights[1:]:
    average = 0.99 * average + 0.01 * value
    published.append(average)
  np.testing.assert_allclose(_our_averages("sd35_stage1.py", weights), published, rtol=1e-5)


def test_small_updates_round_away_in_bfloat16_but_not_in_the_moving_average():
  optimizer = make_optimizer(OptimizerConfig(1e-6))
  params = {"a": jnp.ones(8, jnp.bfloat16), "b": jnp.zeros(8, jnp.bfloat16)}
  state = optimizer.init(params)
  grads = jax.tree.map(jnp.ones_like, params)
  new, new_state, _ = guarded_update(optimizer, grads, state, params)
  np.testing.assert_array_equal(new["a"], params["a"])
  np.testing.assert_allclose(np.asarray(new["b"], np.float32), -1e-6, rtol=0.01)
  types = [leaf.dtype for leaf in jax.tree.leaves((params, state))]
  assert types == [leaf.dtype for leaf in jax.tree.leaves((new, new_state))]
  ema = ema_update({"b": jnp.ones(8)}, {"b": new["b"]}, 0.999)["b"]
  np.testing.assert_allclose(ema, 0.999, rtol=1e-6)


def test_metrics_of_several_updates():
  """Of the second of three the gradient is not finite."""

  def update(x, key):
    bad = x == 1
    info = {"grad_norm": x, "skipped": bad.astype(jnp.float32), "finite": jnp.stack([~bad, True])}
    return x + 1, ({"loss": 2 * x}, info)

  end, losses, info = jax.jit(lambda key: repeated_update(update, jnp.float32(0), key, 3))(
    jax.random.key(0)
  )
  assert float(end) == 3 and float(losses["loss"]) == 2 and float(info["grad_norm"]) == 2
  assert float(info["skipped"]) == 1 and info["finite"].tolist() == [False, True]
