"""Moves between noise levels of the linear flow `x_sigma = (1 - sigma) x0 + sigma eps`.

The network predicts `v = eps - x0`. Everything is float32; sigmas and noise may be [] or [B] (or
already broadcastable against x) where x is [B, ...].
"""

import math

import jax
import jax.numpy as jnp

# Floor of the renoise variance: reached only when the target level is not above the start.
MIN_VARIANCE = 1e-12


def expand(value: jax.Array | float, x: jax.Array) -> jax.Array:
  """Makes a [] or [B] value broadcast against x [B, ...]; values of x's rank pass through.

  Raises:
    ValueError: the value is neither [], [B] nor of x's rank.
  """
  value = jnp.asarray(value, jnp.float32)
  if value.ndim in (0, jnp.ndim(x)):
    return value
  if value.shape != jnp.shape(x)[:1]:
    raise ValueError(f"cannot broadcast shape {value.shape} against a batch {jnp.shape(x)}")
  return value.reshape(value.shape + (1,) * (jnp.ndim(x) - 1))


def per_sample_mean(x: jax.Array) -> jax.Array:
  """Mean over all axes but the batch: [B, ...] -> [B]."""
  return jnp.mean(x.reshape(x.shape[0], -1), axis=-1)


def _f32(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


def add_noise(x0: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
  """The linear flow itself: `(1 - sigma) x0 + sigma noise`, [B, ...]."""
  (x0,) = _f32(x0)
  sigma = expand(sigma, x0)
  return (1.0 - sigma) * x0 + sigma * expand(noise, x0)


def x0_from_v(x: jax.Array, v: jax.Array, sigma: jax.Array) -> jax.Array:
  """The clean prediction `x - sigma v`, [B, ...]."""
  x, v = _f32(x, v)
  return x - expand(sigma, x) * v


def eps_from_v(x: jax.Array, v: jax.Array, sigma: jax.Array) -> jax.Array:
  """The noise prediction `x + (1 - sigma) v`, [B, ...]."""
  x, v = _f32(x, v)
  return x + (1.0 - expand(sigma, x)) * v


def cps_std(next_sigma: jax.Array, eta: float) -> jax.Array:
  """Standard deviation of a CPS transition, `sigma' sin(eta pi / 2)`, of next_sigma's shape."""
  return jnp.asarray(next_sigma, jnp.float32) * jnp.sin(jnp.float32(math.pi / 2) * eta)


def cps_mean(
  x: jax.Array, v: jax.Array, sigma: jax.Array, next_sigma: jax.Array, eta: float
) -> jax.Array:
  """Mean of a coefficient-preserving transition (arXiv 2509.05952).

  `(1 - sigma') x0 + sigma' cos(eta pi / 2) eps` with the x0 and eps that v implies.

  Args:
    x: [B, ...] sample at `sigma`.
    v: [B, ...] velocity there.
    sigma: level of x.
    next_sigma: level to move to.
    eta: stochasticity in [0, 1]; 0 gives the Euler step.

  Returns:
    [B, ...] float32.
  """
  x0, eps = x0_from_v(x, v, sigma), eps_from_v(x, v, sigma)
  next_sigma = expand(next_sigma, x0)
  return (1.0 - next_sigma) * x0 + next_sigma * jnp.cos(jnp.float32(math.pi / 2) * eta) * eps


def cps_step(
  x: jax.Array,
  v: jax.Array,
  sigma: jax.Array,
  next_sigma: jax.Array,
  eta: float,
  noise: jax.Array,
) -> jax.Array:
  """One coefficient-preserving transition: `cps_mean + cps_std * noise`, [B, ...].

  With `eta = 0` or `next_sigma = 0` it is the deterministic Euler step `x + (sigma' - sigma) v`.
  """
  mean = cps_mean(x, v, sigma, next_sigma, eta)
  return mean + expand(cps_std(next_sigma, eta), mean) * expand(noise, mean)


def cps_log_prob(next_x: jax.Array, mean: jax.Array) -> jax.Array:
  """`-mean (x' - mean)^2` over all but the batch, [B]: constants and variance dropped.

  This is the published code's form; `cps_gaussian_log_prob` is the paper's. x' gets no gradient.
  """
  next_x, mean = _f32(next_x, mean)
  return -per_sample_mean(jnp.square(jax.lax.stop_gradient(next_x) - mean))


def cps_gaussian_log_prob(
  next_x: jax.Array, mean: jax.Array, std: jax.Array, *, reduction: str = "sum"
) -> jax.Array:
  """Log-density of x' under N(mean, std^2), the form that RTDMD prints, [B].

  Args:
    next_x: [B, ...] sample, not differentiated.
    mean: [B, ...] `cps_mean`.
    std: `cps_std`, positive, [] or [B].
    reduction: over all but the batch, "sum" (the density's logarithm) or "mean".

  Raises:
    ValueError: unknown reduction.
  """
  if reduction not in ("sum", "mean"):
    raise ValueError(f"reduction {reduction!r}: expected 'sum' or 'mean'")
  average = _mean_log_density(next_x, mean, std)
  return average if reduction == "mean" else average * (mean.size // mean.shape[0])


def _mean_log_density(next_x: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
  next_x, mean = _f32(next_x, mean)
  std = expand(std, mean)
  z = (jax.lax.stop_gradient(next_x) - mean) / std
  return per_sample_mean(-0.5 * jnp.square(z) - jnp.log(std) - 0.5 * math.log(2 * math.pi))


def sde_mean_and_std(
  x: jax.Array,
  v: jax.Array,
  sigma: jax.Array,
  next_sigma: jax.Array,
  noise_level: float,
  *,
  sigma_max: float,
) -> tuple[jax.Array, jax.Array]:
  """Mean and standard deviation of Flow-GRPO's reverse SDE step (arXiv 2505.05470).

  Args:
    x: [B, ...] sample at `sigma`.
    v: [B, ...] velocity there.
    sigma: level of x, positive.
    next_sigma: level to move to, below sigma.
    noise_level: a in `std = a sqrt(sigma / (1 - sigma))`.
    sigma_max: stands for sigma in that denominator where sigma is 1 (the schedule's second level).

  Returns:
    (mean [B, ...], std broadcastable against it); std includes `sqrt(-dt)`.
  """
  x, v = _f32(x, v)
  sigma = expand(sigma, x)
  dt = expand(next_sigma, x) - sigma
  rate = noise_level * jnp.sqrt(sigma / (1.0 - jnp.where(sigma == 1.0, sigma_max, sigma)))
  drift = jnp.square(rate) / (2.0 * sigma)
  mean = x * (1.0 + drift * dt) + v * (1.0 + drift * (1.0 - sigma)) * dt
  return mean, rate * jnp.sqrt(-dt)


def sde_step(
  x: jax.Array,
  v: jax.Array,
  sigma: jax.Array,
  next_sigma: jax.Array,
  noise_level: float,
  noise: jax.Array,
  *,
  sigma_max: float,
) -> jax.Array:
  """One reverse SDE step with the given noise, [B, ...]; see `sde_mean_and_std`."""
  mean, std = sde_mean_and_std(x, v, sigma, next_sigma, noise_level, sigma_max=sigma_max)
  return mean + std * expand(noise, mean)


def sde_log_prob(
  next_x: jax.Array,
  x: jax.Array,
  v: jax.Array,
  sigma: jax.Array,
  next_sigma: jax.Array,
  noise_level: float,
  *,
  sigma_max: float,
) -> jax.Array:
  """Gaussian log-density of an SDE step, averaged over all but the batch, [B]."""
  mean, std = sde_mean_and_std(x, v, sigma, next_sigma, noise_level, sigma_max=sigma_max)
  return _mean_log_density(next_x, mean, std)


def _renoise_coefficients(s: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
  a = (1.0 - t) / (1.0 - s)
  return a, jnp.sqrt(jnp.maximum(jnp.square(t) - jnp.square(a * s), MIN_VARIANCE))


def renoise(x_s: jax.Array, noise: jax.Array, sigma_s: jax.Array, sigma_t: jax.Array) -> jax.Array:
  """Carries x_s [B, ...] from level s up to t with fresh independent noise.

  `a x_s + w n`, `a = (1 - t) / (1 - s)`, `w^2 = t^2 - a^2 s^2`: the w that keeps the marginal
  (RTDMD prints `(t - s) / (1 - s)`; its code has this one). s must be below 1.
  """
  (x_s,) = _f32(x_s)
  a, w = _renoise_coefficients(expand(sigma_s, x_s), expand(sigma_t, x_s))
  return a * x_s + w * expand(noise, x_s)


def ambient_target(
  x_s: jax.Array, noise: jax.Array, sigma_s: jax.Array, sigma_t: jax.Array, *, scale_out: bool
) -> tuple[jax.Array, jax.Array]:
  """Regression target whose conditional mean given `renoise(...)` is the velocity at level t.

  With `b = t + (1 - t) s^2 / (1 - s)^2` and renoise's w: `-x_s / (1 - s) + (b / w) n`, scale 1; or
  multiplied by w (`scale_out`), which stays bounded as t comes down to s, with scale w.

  Args:
    x_s: [B, ...] sample at level s.
    noise: the noise that `renoise` used.
    sigma_s: start level, below 1.
    sigma_t: target level.
    scale_out: multiply target and velocity by w.

  Returns:
    (target [B, ...], scale): compare the target with `scale * v`. The scale is [] or [B, 1, ...].
  """
  (x_s,) = _f32(x_s)
  s, t = expand(sigma_s, x_s), expand(sigma_t, x_s)
  _, w = _renoise_coefficients(s, t)
  b = t + (1.0 - t) * jnp.square(s / (1.0 - s))
  noise = expand(noise, x_s)
  if scale_out:
    return -w / (1.0 - s) * x_s + b * noise, w
  return -x_s / (1.0 - s) + b / w * noise, jnp.ones_like(w)
