"""Sigma schedules of the few-step generators, from raw steps to shifted noise levels."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

NUM_TRAIN_TIMESTEPS = 1000.0

# FLUX.1: mu is linear in the number of packed image tokens through these two points.
FLUX1_BASE = (256, 0.5)
FLUX1_MAX = (4096, 1.15)

# FLUX.2: slope and intercept of mu in the image tokens, fitted at 10 and at 200 steps.
FLUX2_AT_10 = (8.73809524e-05, 1.89833333)
FLUX2_AT_200 = (0.00016927, 0.45666666)
FLUX2_LONG_IMAGE = 4300


def static_shift(sigma: jax.Array, shift: float) -> jax.Array:
  """`shift * sigma / (1 + (shift - 1) * sigma)`, elementwise (arXiv 2403.03206, section 5.3.2)."""
  sigma = jnp.asarray(sigma, jnp.float32)
  return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def dynamic_shift(sigma: jax.Array, mu: jax.Array, kind: str = "exponential") -> jax.Array:
  """Shifts sigma in (0, 1] by `m / (m + 1 / sigma - 1)`, elementwise.

  Args:
    sigma: raw noise levels.
    mu: the shift, [] float.
    kind: "exponential" has `m = exp(mu)`, "linear" has `m = mu` (a scheduler's `time_shift_type`).

  Raises:
    ValueError: `kind` is neither of the two.
  """
  if kind not in ("exponential", "linear"):
    raise ValueError(f"time shift {kind!r}: expected 'exponential' or 'linear'")
  m = jnp.asarray(mu, jnp.float32)
  m = jnp.exp(m) if kind == "exponential" else m
  return m / (m + 1.0 / jnp.asarray(sigma, jnp.float32) - 1.0)


def stretch_to_terminal(sigmas: jax.Array, terminal: float) -> jax.Array:
  """Stretches a decreasing schedule [K] so that its last level is `terminal`, 1 staying at 1."""
  rest = 1.0 - sigmas
  return 1.0 - rest * (1.0 - terminal) / rest[-1]


def _raw(steps: Sequence[float] | jax.Array) -> jax.Array:
  sigmas = jnp.asarray(steps, jnp.float32) / NUM_TRAIN_TIMESTEPS
  if sigmas.ndim != 1 or sigmas.shape[0] == 0:
    raise ValueError(f"steps: expected a non-empty list of timesteps, got shape {sigmas.shape}")
  return sigmas


def sd3_sigmas(steps: Sequence[float] | jax.Array, *, shift: float = 3.0) -> jax.Array:
  """Schedule of SD3 and SD3.5: the static shift, rounded to 6 decimals.

  Args:
    steps: [K] decreasing timesteps in (0, 1000], for instance `[1000, 750, 500, 250]`.
    shift: the scheduler's `shift`.

  Returns:
    [K] float32 sigmas without the final 0.
  """
  return jnp.round(static_shift(_raw(steps), shift), 6)


def flux1_mu(image_tokens: int | jax.Array) -> jax.Array:
  """FLUX.1's shift for a number of packed (2 x 2) image tokens, [] float32."""
  (n0, mu0), (n1, mu1) = FLUX1_BASE, FLUX1_MAX
  slope = (mu1 - mu0) / (n1 - n0)
  return slope * jnp.asarray(image_tokens, jnp.float32) + (mu0 - slope * n0)


def flux2_mu(image_tokens: int | jax.Array, num_steps: int) -> jax.Array:
  """FLUX.2's empirical shift, [] float32.

  `num_steps` is the length of the whole step list: a rollout that stops early keeps the mu (and
  the schedule) of the full list.
  """
  n = jnp.asarray(image_tokens, jnp.float32)
  at_10 = FLUX2_AT_10[0] * n + FLUX2_AT_10[1]
  at_200 = FLUX2_AT_200[0] * n + FLUX2_AT_200[1]
  line = at_200 + (at_200 - at_10) / 190.0 * (num_steps - 200.0)
  return jnp.where(n > FLUX2_LONG_IMAGE, at_200, line)


def flux1_sigmas(
  steps: Sequence[float] | jax.Array,
  *,
  image_tokens: int | jax.Array,
  time_shift: str = "exponential",
  shift_terminal: float | None = None,
) -> jax.Array:
  """Schedule of FLUX.1-dev.

  Args:
    steps: [K] decreasing timesteps in (0, 1000].
    image_tokens: packed image tokens, (height / 16) * (width / 16) pixels.
    time_shift: the scheduler's `time_shift_type`.
    shift_terminal: the scheduler's `shift_terminal`, if it sets one.

  Returns:
    [K] float32 sigmas without the final 0.
  """
  sigmas = dynamic_shift(_raw(steps), flux1_mu(image_tokens), time_shift)
  return sigmas if shift_terminal is None else stretch_to_terminal(sigmas, shift_terminal)


def flux2_sigmas(
  steps: Sequence[float] | jax.Array,
  *,
  image_tokens: int | jax.Array,
  time_shift: str = "exponential",
  shift_terminal: float | None = None,
) -> jax.Array:
  """Schedule of FLUX.2-klein; arguments and result as in `flux1_sigmas`."""
  raw = _raw(steps)
  sigmas = dynamic_shift(raw, flux2_mu(image_tokens, raw.shape[0]), time_shift)
  return sigmas if shift_terminal is None else stretch_to_terminal(sigmas, shift_terminal)
