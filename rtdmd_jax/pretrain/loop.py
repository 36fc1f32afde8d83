"""The plain training loop of the networks that are trained from scratch."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rtdmd_jax.runtime.checkpoint import Checkpoints
from rtdmd_jax.training.optim import effective_decay

Tree = Any
Schedule = Callable[[jax.Array], jax.Array]
LossFn = Callable[[Tree, dict[str, jax.Array], jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def adamw(schedule: Schedule) -> optax.GradientTransformation:
  """AdamW with a short memory of squares, for short runs."""
  return optax.adamw(schedule, 0.9, 0.99, weight_decay=1e-4)


def muon(schedule: Schedule) -> optax.GradientTransformation:
  """Orthogonalised steps for matrices (Jordan et al. 2024), Adam at a tenth of the rate else."""
  return optax.contrib.muon(
    schedule, adam_b2=0.99, adam_learning_rate=lambda step: 0.1 * schedule(step)
  )


class Training(NamedTuple):
  """Settings of a plain training.

  Attributes:
    name: its name in the log lines.
    steps: number of updates.
    learning_rate: peak.
    ema_decay: decay of the average, warmed up as `(1 + n) / (10 + n)`.
    seed: of the batches and of the loss's keys.
    checkpoints: directory of this network's checkpoints.
    optimizer: maps the learning-rate schedule to the transformation after clipping.
    warmup: updates of linear warm-up.
    log_every: updates between log lines.
    save_every: updates between checkpoints.
  """

  name: str
  steps: int
  learning_rate: float
  ema_decay: float
  seed: int
  checkpoints: Path
  optimizer: Callable[[Schedule], optax.GradientTransformation] = adamw
  warmup: int = 100
  log_every: int = 50
  save_every: int = 200


def train(
  training: Training,
  loss_fn: LossFn,
  params: Tree,
  next_batch: Callable[[np.random.Generator], dict[str, np.ndarray]],
) -> Tree:
  """Trains with warm-up and cosine decay; returns the moving average of the parameters.

  Started again, it goes on from its last checkpoint as if it had never stopped.

  Args:
    training: settings.
    loss_fn: `(params, batch, key) -> (loss, metrics)`.
    params: float32 start.
    next_batch: maps a generator to a batch of numpy arrays.
  """
  name, steps, seed, rate = training.name, training.steps, training.seed, training.learning_rate
  schedule = optax.schedules.warmup_cosine_decay_schedule(
    0.0, rate, min(training.warmup, steps // 10), steps, 0.01 * rate
  )
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), training.optimizer(schedule))

  def update(params, opt_state, average, batch, step):
    key = jax.random.fold_in(jax.random.key(seed), step)
    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    decay = effective_decay(training.ema_decay, step, warmup=True)
    average = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, average, params)
    return params, opt_state, average, metrics | {"loss": loss}

  update = jax.jit(update, donate_argnums=(0, 1, 2))
  state = (params, optimizer.init(params), jax.tree.map(jnp.copy, params))
  began = time.time()
  with Checkpoints(training.checkpoints, keep=1) as saved:
    start = saved.latest_step or 0
    if start:
      state, _ = saved.restore(state)
      print(f"{name} goes on after {start}/{steps}", flush=True)
    for step in range(start, steps):
      batch = next_batch(np.random.default_rng((seed, step)))
      *state, metrics = update(*state, batch, jnp.int32(step))
      done = step + 1
      if done % training.log_every == 0 or done == steps:
        values = "  ".join(f"{k} {float(v):.5f}" for k, v in metrics.items())
        print(f"{name} {done}/{steps}  {values}  {time.time() - began:.0f} s", flush=True)
      if done % training.save_every == 0 and done < steps:
        saved.save(done, tuple(state), {})
  return state[2]
