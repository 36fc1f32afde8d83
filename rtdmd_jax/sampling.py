"""Samplers over a velocity: few stochastic steps, or many Euler steps."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.algo import schedules
from rtdmd_jax.algo.rollout import Velocity, batched
from rtdmd_jax.algo.subgrpo import sample_noise
from rtdmd_jax.algo.transitions import cps_step


def few_step_sigmas(steps: Sequence[float], *, shift: float) -> np.ndarray:
  """The few-step schedule [K + 1] of SD3, with the final 0."""
  return np.append(np.asarray(schedules.sd3_sigmas(list(steps), shift=shift)), 0.0).astype(
    np.float32
  )


def euler_sigmas(num_steps: int, *, shift: float) -> np.ndarray:
  """diffusers' `FlowMatchEulerDiscreteScheduler` schedule [num_steps + 1], with the final 0.

  Its lowest level is shifted twice, as in diffusers.
  """

  def shifted(sigma):
    return shift * sigma / (1 + (shift - 1) * sigma)

  sigmas = shifted(np.linspace(1.0, shifted(1e-3), num_steps))
  return np.append(sigmas, 0.0).astype(np.float32)


def sample(
  velocity: Velocity,
  key: jax.Array,
  index: jax.Array,
  shape: tuple[int, ...],
  sigmas: jax.Array,
  *,
  eta: float,
) -> jax.Array:
  """Clean latents [B, *shape] from noise along `sigmas` [K + 1]; `eta` 0 is the Euler method.

  Every image's noise is a function of `key` and its `index` [B] alone.
  """
  sigmas = jnp.asarray(sigmas, jnp.float32)
  start_key, step_key = jax.random.split(key)

  def step(i: jax.Array, x: jax.Array) -> jax.Array:
    v = velocity(x, batched(sigmas[i], x)).astype(jnp.float32)
    noise = 0.0
    if eta:
      noise = sample_noise(jax.random.fold_in(step_key, i), index, shape)
    return cps_step(x, v, sigmas[i], sigmas[i + 1], eta, noise)

  start = sample_noise(start_key, index, shape)
  return jax.lax.fori_loop(0, sigmas.shape[0] - 1, step, start)
