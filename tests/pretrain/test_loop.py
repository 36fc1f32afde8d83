import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.pretrain.loop import Training, train


class Interrupted(Exception):
  pass


def _train(checkpoints, stop_at=None):
  calls = []

  def next_batch(rng):
    if stop_at is not None and len(calls) == stop_at:
      raise Interrupted
    calls.append(1)
    return {"x": rng.normal(size=4).astype(np.float32)}

  def loss_fn(params, batch, key):
    error = params["w"] - batch["x"] + 0.1 * jax.random.normal(key, (4,))
    return jnp.mean(error**2), {}

  training = Training("w", 6, 0.1, 0.9, seed=1, checkpoints=checkpoints, save_every=2)
  average = train(training, loss_fn, {"w": jnp.ones(4)}, next_batch)
  return average, len(calls)


def test_an_interrupted_training_ends_as_the_undisturbed_one(tmp_path):
  whole, _ = _train(tmp_path / "whole")
  with pytest.raises(Interrupted):
    _train(tmp_path / "parts", stop_at=5)
  resumed, steps = _train(tmp_path / "parts")
  assert steps == 2  # it went on after the checkpoint of step 4
  np.testing.assert_array_equal(resumed["w"], whole["w"])
  assert float(jnp.abs(whole["w"] - 1.0).max()) > 0.01
