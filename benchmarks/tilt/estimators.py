"""Facts about the estimators, measured on the mixture: each returns a dictionary of numbers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tilt import teachers, training
from benchmarks.tilt.training import MATCHING, RECORDER, SCORING, SIGMAS, Problem, Training
from rtdmd_jax.algo.losses import ambient_fake_score_loss
from rtdmd_jax.algo.transitions import (
  add_noise,
  ambient_target,
  cps_log_prob,
  cps_mean,
  cps_step,
  renoise,
  x0_from_v,
)
from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.training.hybrid_loss import Transition, policy_term, ratio_metrics
from rtdmd_jax.training.optim import Optimizers
from rtdmd_jax.training.settings import PolicyConfig
from rtdmd_jax.training.stage2 import Stage2
from rtdmd_jax.training.state import TrainState
from rtdmd_jax.training.velocities import generator_velocity

ADVANTAGES = {"weight_advantages": False, "gaussian_log_prob": True, "subset_factor": True}


def ambient(mixture: dict, *, count: int = 400_000, cells: int = 12, seed: int = 0) -> dict:
  """Does the ambient target average to the exact velocity, everywhere?

  Samples at level s alone are renoised to t; within each cell of x_t the mean of target minus exact
  velocity is compared with its standard error. `chi2_per_cell` is near 1 for an unbiased target.
  """
  rng, base, rows = np.random.default_rng(seed), teachers.spectral(mixture), []
  for s, t in ((0.0, 0.3), (0.5, 0.6), (0.5, 0.8), (0.75, 0.85), (0.9, 0.95)):
    clean = teachers.sample(mixture, count, rng)
    x_s = (1 - s) * clean + s * rng.normal(size=clean.shape)
    noise = rng.normal(size=clean.shape)
    x_t = renoise(x_s, noise, s, t)
    target, scale = ambient_target(x_s, noise, s, t, scale_out=True)
    exact = teachers.velocity(base, x_t, jnp.full(count, t))
    error = np.asarray(target / scale - exact, np.float64)
    position = np.asarray(x_t, np.float64)
    edges = [np.quantile(x, np.linspace(0, 1, cells + 1)[1:-1]) for x in position.T]
    column, row = (np.searchsorted(e, x) for e, x in zip(edges, position.T, strict=True))
    cell = cells * column + row
    n = np.maximum(np.bincount(cell, minlength=cells**2), 1)
    mean, square = (
      np.stack([np.bincount(cell, e**k, cells**2) / n for e in error.T]) for k in (1, 2)
    )
    used = n >= 30
    z = (mean / np.sqrt(np.maximum(square - mean**2, 1e-12) / n))[:, used]
    relative = np.sqrt(np.average(mean**2, axis=1, weights=n).sum() / np.mean(exact**2) / 2)
    rows.append({
      "s": s, "t": t, "chi2_per_cell": float(np.mean(z**2)), "cells": int(z.size),
      "relative_error": float(relative),
    })  # fmt: skip
  return {"count": count, "levels": rows}


def consistency(mixture: dict, *, anchors: int = 256, paths: int = 4096, t: float = 0.6) -> dict:
  """Two-sample estimate of the regulariser against nested sampling, and against one sample.

  The field is the exact velocity plus a constant, or the exact one itself.
  """
  base, back, eta = teachers.spectral(mixture), 0.2, 0.9
  keys = jax.random.split(jax.random.key(0), 4)
  x0 = jnp.asarray(teachers.sample(mixture, anchors, np.random.default_rng(0)), jnp.float32)
  noise = jax.random.normal(keys[0], x0.shape)
  x_t = add_noise(x0, noise, t)

  def measure(offset: float) -> dict:
    def field(x: jax.Array, sigma: jax.Array) -> jax.Array:
      return teachers.velocity(base, x, sigma) + offset

    @jax.jit
    def one(key: jax.Array) -> tuple[jax.Array, ...]:
      # At s = 0 the renoised sample is x_t itself.
      z = jax.random.normal(key, (2, 1, *x0.shape))
      value = lambda two: ambient_fake_score_loss(  # noqa: E731
        field, x0, 0.0, t, noise, consistency_weight=1.0, two_sample=two, eta=eta,
        steps_back=jnp.full((1, anchors), back), transition_noise=z,
      )[1]["consistency"]  # fmt: skip
      level = jnp.full(anchors, t)
      x = cps_step(x_t, field(x_t, level), t, t - back, eta, z[0, 0])
      end = x0_from_v(x, field(x, level - back), t - back)
      return value(True), value(False), end - x0_from_v(x_t, field(x_t, level), t)

    two, single, gap = jax.lax.map(one, jax.random.split(keys[1], paths))
    # The mean over paths of an independent half gives the truth almost without noise.
    halves = jnp.mean(gap[: paths // 2], 0), jnp.mean(gap[paths // 2 :], 0)
    error = float(jnp.std(two) / np.sqrt(paths))
    return {
      "squared_violation": float(jnp.mean(halves[0] * halves[1])),
      "two_sample": float(jnp.mean(two)),
      "two_sample_error": error,
      "one_sample": float(jnp.mean(single)),
    }

  return {"t": t, "back": back, "offset_velocity": measure(0.5), "exact_velocity": measure(0.0)}


def _gradients(
  problem: Problem, state: TrainState, shape: Training, policy: PolicyConfig, own: bool, count: int
) -> tuple[np.ndarray, np.ndarray]:
  """`policy_step`'s gradients [count, P] of independent epochs, and its last epoch's rewards.

  With `own` every sample is its own prompt during the rollout, so that no noise is shared.
  """
  data, fixed = training.batch(shape), training.frozen(problem)
  n = data.sample_index.shape[0]
  alone = data.replace(
    conditioning=Conditioning(jnp.zeros((n, 1, 1)), None),
    prompt_index=jnp.arange(n),
    reward_text={"place": jnp.zeros((n, 1))},
  )
  recorders = Optimizers(RECORDER, RECORDER)
  stage = Stage2(training.roles(2), MATCHING, policy, SCORING, recorders)
  state = state.replace(generator=state.ema, generator_opt=RECORDER.init(state.ema))

  @jax.jit
  def all_epochs(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    def epoch(key: jax.Array) -> tuple[jax.Array, jax.Array]:
      samples = stage.collect_rollout(state, fixed, alone if own else data, key)
      new, _ = stage.policy_step(state, fixed, data, samples, samples.rewards, key)
      flat = jnp.concatenate([g.ravel() for g in jax.tree.leaves(new.generator_opt)])
      # The step averages over its terms; the sum over them estimates the same for every policy.
      return (policy.num_train_steps + 1) * flat, samples.rewards["place"]

    return jax.lax.map(epoch, keys)

  gradients, rewards = all_epochs(jax.random.split(jax.random.key(7), count))
  return np.asarray(gradients, np.float64), np.asarray(rewards, np.float64)


def subgrpo(problem: Problem, state: TrainState, *, count: int = 300) -> dict:
  """Variance of the policy gradient at 384 samples, by trained steps, shared noise and group size.

  `steps` is what may be chosen: a single index leaves out the randomness of the choice.
  """
  rows = []
  cases = [(3, 0, 2, True, 16)]
  cases += [(m, 0, 2, own, 16) for m in (1, 2) for own in (True, False)]
  cases += [(1, i, i, own, n) for n in (16, 2) for i in range(3) for own in (True, False)]
  for m, first, last, own, repeats in cases:
    shape = Training(1, groups=384 // repeats, repeats=repeats)
    policy = PolicyConfig(
      num_train_steps=m, range_start=first, range_end=last, dmd_weight=0.0, reward_weight=0.0,
      advantage_limit=1e6, **ADVANTAGES,
    )  # fmt: skip
    g, _ = _gradients(problem, state, shape, policy, own, count)
    mean = g.mean(0)
    variance = g.var(0, ddof=1).sum()
    rows.append({
      "M": m, "steps": [first, last], "shared_noise": not own, "repeats": repeats,
      "variance": float(variance),
      # The squared norm of the mean, without what its own noise adds.
      "signal": float(mean @ mean - variance / count),
    })  # fmt: skip
  return {"images": 384, "epochs": count, "rows": rows}


def half_precision(problem: Problem, state: TrainState, *, images: int = 4096) -> dict:
  """The ratio of an on-policy update whose generator computes in bfloat16.

  `drift` and `outside_clip` are of the ratio to log-probabilities that another program (the same
  operations, compiled one by one) computes of the same network. `loss` is that of advantage 1
  everywhere: exactly -1 if the ratio that trains is 1 for every sample.
  """
  rows, fixed, policy = [], training.frozen(problem), PolicyConfig(num_train_steps=3)
  path, sigmas = training.path(state.ema, fixed, images), jnp.array(SIGMAS)
  path = jnp.asarray(path, jnp.float32).reshape(len(SIGMAS), images, 1, 1, 2)
  ones, one = jnp.ones(images), Conditioning(jnp.zeros((images, 1, 1)), None)
  for dtype in (jnp.float32, jnp.bfloat16):
    roles = training.roles(2)._replace(apply=partial(training.apply, dtype=dtype))
    velocity = generator_velocity(roles, fixed, state.ema, one)

    @jax.jit
    def loss(i: jax.Array, x: jax.Array, x_next: jax.Array, old: jax.Array, velocity=velocity):
      v = velocity(x, jnp.full(images, sigmas[i]))
      transition = Transition(x, v, x_next, sigmas[i], sigmas[i + 1], old)
      _, parts = policy_term(transition, ones, ones, MATCHING.eta, policy, 4)
      ratios = ratio_metrics(parts.pop("ratio"), policy)
      return parts | {name: metric.compute() for name, metric in ratios.items()}

    for i in range(3):
      x, x_next = path[i], path[i + 1]
      v = velocity(x, jnp.full(images, sigmas[i]))
      old = cps_log_prob(x_next, cps_mean(x, v, sigmas[i], sigmas[i + 1], MATCHING.eta))
      found = loss(i, x, x_next, old)
      rows.append({
        "dtype": jnp.dtype(dtype).name, "step": i, "loss": float(found["loss/policy"]),
        "drift": float(found["ratio/drift"]), "outside_clip": float(found["ratio/outside_clip"]),
      })  # fmt: skip
  return {"images": images, "clip": policy.clip_high, "rows": rows}


def hybrid(problem: Problem, state: TrainState, *, count: int = 200) -> dict:
  """`policy_step`'s hybrid gradient against the derivative of the expected reward.

  Along the exact gradient's direction, and along a random one. The exact value differentiates the
  whole rollout, and a finite difference of the expected reward with common noise checks it.
  """
  fixed, shape = training.frozen(problem), Training(1, groups=8, repeats=256)
  leaves, structure = jax.tree.flatten(state.ema)

  def unflatten(vector: jax.Array) -> Any:
    parts = np.split(np.arange(vector.size), np.cumsum([a.size for a in leaves])[:-1])
    rebuilt = [vector[p].reshape(a.shape) for p, a in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, rebuilt)

  theta = jnp.concatenate([a.ravel() for a in leaves])

  @partial(jax.jit, static_argnames="n")
  def expected(theta: jax.Array, key: jax.Array, n: int = 20_000) -> jax.Array:
    one = Conditioning(jnp.zeros((n, 1, 1)), None)
    v = generator_velocity(training.roles(2), fixed, unflatten(theta), one)
    z = jax.random.normal(key, (len(SIGMAS), n, 1, 1, 2))
    x = z[-1]
    for i, (s, r) in enumerate(zip(SIGMAS[:-1], SIGMAS[1:], strict=True)):
      x = cps_step(x, v(x, jnp.full(n, s)), s, r, MATCHING.eta, z[i])
    return jnp.mean(training.place_reward(fixed.rewards["place"], x, None))

  keys = jax.random.split(jax.random.key(3), 20)
  exact = np.stack([np.asarray(jax.jit(jax.grad(expected))(theta, k), np.float64) for k in keys])
  unit = exact.mean(0) / np.linalg.norm(exact.mean(0))
  spread = _gradients(problem, state, shape, PolicyConfig(dmd_weight=0.0), True, 20)[1].std()
  policy = PolicyConfig(
    num_train_steps=3, dmd_weight=0.0, reward_weight=1.0, reward_margin=100.0,
    advantage_limit=1e6, policy_weight=float(spread) * shape.repeats / (shape.repeats - 1),
    **ADVANTAGES,
  )  # fmt: skip
  both, last = (
    -_gradients(problem, state, shape, p, True, count)[0]
    for p in (policy, policy._replace(policy_weight=0.0))
  )
  other = np.random.default_rng(1).normal(size=unit.shape)
  rows = []
  for name, u in (("along the gradient", unit), ("random", other / np.linalg.norm(other))):
    h = 1e-2
    step = jnp.asarray(h * u, jnp.float32)
    slopes = [(expected(theta + step, k) - expected(theta - step, k)) / (2 * h) for k in keys]
    rows.append({"direction": name} | {
      part: {"mean": float(np.mean(x)), "error": float(np.std(x, ddof=1) / np.sqrt(len(x)))}
      for part, x in (
        ("finite_difference", np.array(slopes, np.float64)), ("exact", exact @ u),
        ("hybrid", both @ u), ("last_step_alone", last @ u),
      )
    })  # fmt: skip
  return {"images": shape.groups * shape.repeats, "epochs": count, "rows": rows}
