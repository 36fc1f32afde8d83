"""Few-step generator rollouts.

A velocity is a callable `(x [B, ...], sigma [B]) -> v [B, ...]` with conditioning inside.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rtdmd_jax.algo.transitions import cps_log_prob, cps_mean, cps_std, cps_step, expand, x0_from_v

Velocity = Callable[[jax.Array, jax.Array], jax.Array]


class LastStep(NamedTuple):
  """The last executed step of a rollout; x is constant, what follows from v is differentiable."""

  x: jax.Array  # [B, ...] before the step, at `sigma`
  v: jax.Array  # [B, ...] float32
  x_next: jax.Array  # [B, ...] after the step, at `next_sigma`
  x0: jax.Array  # [B, ...] clean prediction
  sigma: jax.Array  # []
  next_sigma: jax.Array  # []


class Trajectory(NamedTuple):
  """All K transitions of a rollout, stacked; `x_next[-1]` is the clean sample."""

  x: jax.Array  # [K, B, ...] before each step
  x_next: jax.Array  # [K, B, ...] after each step
  v: jax.Array  # [K, B, ...]
  log_prob: jax.Array  # [K, B], `cps_log_prob`; 0 for a deterministic step


def batched(sigma: jax.Array, x: jax.Array) -> jax.Array:
  """Sigma [] or [B] as the [B] float32 that a velocity expects."""
  return jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), x.shape[:1])


def _check(noise: jax.Array, sigmas: jax.Array, step_noise: jax.Array) -> int:
  """Returns K."""
  steps = sigmas.shape[0] - 1
  if steps < 1:
    raise ValueError(f"sigmas {sigmas.shape}: expected [K + 1] levels with the final 0")
  if step_noise.shape != (steps, *noise.shape):
    raise ValueError(f"step_noise {step_noise.shape}: expected {(steps, *noise.shape)}")
  return steps


def generator_rollout(
  velocity: Velocity,
  noise: jax.Array,
  sigmas: jax.Array,
  step_noise: jax.Array,
  *,
  eta: float,
  stop: int | jax.Array,
  differentiable: bool = True,
) -> LastStep:
  """Runs `stop` CPS steps from noise, the last one with gradient (RTDMD, arXiv 2605.26108).

  The network runs exactly `stop` times, also when `stop` is traced.

  Args:
    velocity: the generator, without guidance.
    noise: [B, ...] start at `sigmas[0]`.
    sigmas: [K + 1] schedule with the final 0.
    step_noise: [K, B, ...] noise of each step.
    eta: stochasticity of the steps.
    stop: steps to execute, in 1..K, static or a traced [] int.
    differentiable: False gives the last step no gradient either, and the compiled program one
      network in place of two.

  Returns:
    The last executed step.

  Raises:
    ValueError: shapes disagree, or a static stop is outside 1..K.
  """
  sigmas = jnp.asarray(sigmas, jnp.float32)
  steps = _check(noise, sigmas, step_noise)
  if isinstance(stop, int) and not 1 <= stop <= steps:
    raise ValueError(f"stop {stop}: expected 1..{steps}")
  constant = jax.lax.stop_gradient
  x, last = constant(noise.astype(jnp.float32)), stop - 1
  # What velocity closes over must not carry tangents into the loop: a loop with a traced number of
  # turns cannot be transposed.
  frozen, closed_over = jax.closure_convert(velocity, x, batched(sigmas[0], x))
  closed_over = constant(closed_over)

  def step(i: jax.Array, before: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    x = before[-1]
    v = frozen(x, batched(sigmas[i], x), *closed_over).astype(jnp.float32)
    return x, v, cps_step(x, v, sigmas[i], sigmas[i + 1], eta, step_noise[i])

  turns = last if differentiable else stop
  x, v, x_next = jax.lax.fori_loop(0, turns, step, (x, jnp.zeros_like(x), x))
  sigma, next_sigma = sigmas[last], sigmas[last + 1]
  if differentiable:
    x = x_next
    v = velocity(x, batched(sigma, x)).astype(jnp.float32)
    x_next = cps_step(x, v, sigma, next_sigma, eta, step_noise[last])
  return LastStep(x, v, x_next, x0_from_v(x, v, sigma), sigma, next_sigma)


def sample_rollout(
  velocity: Velocity,
  noise: jax.Array,
  sigmas: jax.Array,
  step_noise: jax.Array,
  *,
  eta: float,
) -> Trajectory:
  """Runs all K CPS steps without gradient and records every transition (RTDMD, arXiv 2605.26108).

  Arguments and errors as in `generator_rollout`.
  """
  sigmas = jnp.asarray(sigmas, jnp.float32)
  _check(noise, sigmas, step_noise)

  def step(x: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, Trajectory]:
    sigma, next_sigma, z = inputs
    v = velocity(x, batched(sigma, x)).astype(jnp.float32)
    mean = cps_mean(x, v, sigma, next_sigma, eta)
    x_next = mean + expand(cps_std(next_sigma, eta), mean) * z
    return x_next, Trajectory(x, x_next, v, cps_log_prob(x_next, mean))

  inputs = (sigmas[:-1], sigmas[1:], step_noise)
  _, trajectory = jax.lax.scan(step, noise.astype(jnp.float32), inputs)
  return jax.lax.stop_gradient(trajectory)


def subinterval_start(
  last: LastStep,
  sigmas: jax.Array,
  *,
  mode: str,
  boundary_index: int,
  noise: jax.Array,
  eta: float,
) -> tuple[jax.Array, jax.Array]:
  """The sample and level at which a sub-interval starts (RTDMD, arXiv 2605.26108).

  Args:
    last: from `generator_rollout`; gradients pass through its v.
    sigmas: [K + 1] schedule.
    mode: "next_sigma" takes the step's own result; "fixed_boundary" makes a new CPS transition
      from the step's x to `min(sigma, sigmas[boundary_index])`.
    boundary_index: index of the boundary, at least 1 (at sigma 1 there is nothing to renoise).
    noise: [B, ...] of that transition; unused by "next_sigma".
    eta: its stochasticity.

  Returns:
    (x_s [B, ...], sigma_s []).

  Raises:
    ValueError: unknown mode, or boundary_index out of range.
  """
  if mode == "next_sigma":
    return last.x_next, last.next_sigma
  if mode != "fixed_boundary":
    raise ValueError(f"start mode {mode!r}: expected 'next_sigma' or 'fixed_boundary'")
  if not 1 <= boundary_index < sigmas.shape[0]:
    raise ValueError(f"boundary_index {boundary_index}: expected 1..{sigmas.shape[0] - 1}")
  sigma_s = jnp.minimum(last.sigma, sigmas[boundary_index])
  return cps_step(last.x, last.v, last.sigma, sigma_s, eta, noise), sigma_s
