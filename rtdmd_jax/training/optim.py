"""Optimizers, guarded updates and the moving average of adapters."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rtdmd_jax.training.settings import OptimizerConfig
from rtdmd_jax.training.state import TrainState

Tree = Any


class Optimizers(NamedTuple):
  """One optimizer for each trained network."""

  generator: optax.GradientTransformation
  fake_score: optax.GradientTransformation


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
  """Clip by global norm, then AdamW at a constant rate after linear warm-up from 0."""
  schedule = optax.schedules.warmup_constant_schedule(
    0.0 if config.warmup_steps else config.learning_rate, config.learning_rate, config.warmup_steps
  )
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay),
  )


def guarded_update(
  optimizer: optax.GradientTransformation, grads: Tree, opt_state: Tree, params: Tree
) -> tuple[Tree, Tree, dict[str, jax.Array]]:
  """One optimizer step that a non-finite gradient turns into no step at all.

  Returns:
    The new parameters and optimizer state (the old ones if any gradient entry is not finite), and
    the metrics `grad_norm` (before clipping), `update_norm` (of the change to the parameters),
    `skipped` (1 if the update was not applied) and `finite` ([leaves] bool, in the order of the
    tree: which gradients are).
  """
  norm = optax.global_norm(grads)
  finite = jnp.isfinite(norm)
  # Zeros instead of NaN keep the discarded branch itself finite.
  safe = jax.tree.map(lambda g: jnp.where(finite, g, jnp.zeros_like(g)), grads)
  updates, new_opt_state = optimizer.update(safe, opt_state, params)
  new_params = optax.apply_updates(params, updates)

  def keep(new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(finite, new, old)

  return (
    jax.tree.map(keep, new_params, params),
    jax.tree.map(keep, new_opt_state, opt_state),
    {
      "grad_norm": norm,
      "update_norm": jnp.where(finite, optax.global_norm(updates), 0.0),
      "skipped": 1.0 - finite.astype(jnp.float32),
      "finite": jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]),
    },
  )


def apply_gradients(
  state: TrainState, network: str, optimizer: optax.GradientTransformation, grads: Tree
) -> tuple[TrainState, dict[str, jax.Array]]:
  """The state after a guarded update of one network, and the update's metrics.

  Args:
    state: before the update.
    network: "generator" or "fake_score".
    optimizer: the network's.
    grads: of the network's adapters.

  Returns:
    The new state, and the metrics of `guarded_update` as `<network>/<name>`.
  """
  adapters, opt_state = state.trained(network)
  adapters, opt_state, info = guarded_update(optimizer, grads, opt_state, adapters)
  metrics = {f"{network}/{name}": value for name, value in info.items()}
  return state.with_trained(network, adapters, opt_state), metrics


def repeated_update(
  update: Callable[[Tree, jax.Array], tuple[Tree, tuple[Tree, dict[str, jax.Array]]]],
  start: Tree,
  key: jax.Array,
  count: int,
) -> tuple[Tree, Tree, dict[str, jax.Array]]:
  """`count` updates one after the other, in a loop, so that they are compiled once.

  Args:
    update: maps (what is updated, key) to the same updated and (losses, the metrics of
      `guarded_update`).
    start: what is updated.
    key: of the first update; the i-th has `fold_in(key, i)`, i counting from 0.
    count: from 1.

  Returns:
    The result of the last update, the means of the losses, and the metrics: norms of the last
    update, `skipped` 1 if any was, `finite` of gradients that were so in all.
  """
  if count == 1:
    end, (losses, info) = update(start, key)
    return end, losses, info
  later = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(1, count))
  end, (losses, info) = jax.lax.scan(update, start, jnp.concatenate([key[None], later]))
  reduced = {"skipped": jnp.max, "finite": partial(jnp.all, axis=0)}
  info = {name: reduced.get(name, lambda values: values[-1])(v) for name, v in info.items()}
  return end, jax.tree.map(jnp.mean, losses), info


def effective_decay(
  decay: float, step: jax.Array | int, *, warmup: bool = False, applications: int = 1
) -> jax.Array | float:
  """The decay of one update of the moving average.

  Args:
    decay: of one application, in [0, 1].
    step: updates of the parameters so far; for the warm-up alone.
    warmup: not more than `(1 + step) / (10 + step)`.
    applications: how often in a row the same parameters are averaged in.
  """
  if warmup:
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return decay**applications


def ema_update(
  ema: Tree, params: Tree, decay: jax.Array | float, when: jax.Array | bool = True
) -> Tree:
  """`decay * ema + (1 - decay) * params` where `when` holds, else `ema`."""
  rate = jnp.where(when, 1.0 - decay, 0.0)
  return jax.tree.map(lambda e, p: e + rate * (p - e), ema, params)
