"""Draws of noise levels, stops and guidance. Arguments are timesteps (0 to 1000) where named so;
results are sigmas in [0, 1]. Every draw takes its key.

`samples` is either the batch size B or the [B] global indices of the samples. With indices each
sample's draw is a function of the key and its index only, so that it does not depend on how a
batch is cut.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rtdmd_jax.algo.schedules import NUM_TRAIN_TIMESTEPS, static_shift

# Keeps a draw strictly inside its interval after rounding to float32.
INSIDE_MARGIN = 1e-4


def _per_sample(
  draw: Callable[[jax.Array, tuple[int, ...]], jax.Array],
  key: jax.Array,
  samples: int | jax.Array,
  *shape: int,
) -> jax.Array:
  """`draw(key, shape)` for each sample, [B, *shape]."""
  if isinstance(samples, int):
    return draw(key, (samples, *shape))
  return jax.vmap(lambda index: draw(jax.random.fold_in(key, index), shape))(samples)


def renoise_sigma(
  key: jax.Array,
  sigma_s: jax.Array,
  samples: int | jax.Array,
  *,
  offset: float = 10.0,
  end: float = 1000.0,
  low: float = 20.0,
  high: float = 980.0,
  inside: bool = False,
) -> jax.Array:
  """Draws the level to which a sub-interval's start is renoised (RTDMD, arXiv 2605.26108).

  Uniform on `[1000 s + offset, end]` timesteps (`[start, start + 1]` if the offset start reaches
  the end), then clamped to `[low, high]`. The clamp is a point mass at `high` and, for s above
  `high`, lies below s: with `inside` the draw is uniform in the open interval, unclamped, and the
  offset is dropped where it would leave nothing.

  Args:
    key: one key a batch.
    sigma_s: start level in sigma, [] or [B].
    samples: B, or [B] global sample indices.
    offset: timesteps by which the interval starts above s.
    end: last timestep of the interval.
    low: lower clamp, timesteps.
    high: upper clamp, timesteps.
    inside: sample the open interval instead of clamping.

  Returns:
    [B] float32 sigmas.
  """
  origin = jnp.asarray(sigma_s, jnp.float32) * NUM_TRAIN_TIMESTEPS
  start = origin + offset
  u = _per_sample(jax.random.uniform, key, samples)
  if inside:
    start = jnp.where(start < end, start, origin)
    t = start + (INSIDE_MARGIN + (1.0 - 2.0 * INSIDE_MARGIN) * u) * (end - start)
  else:
    stop = jnp.where(start < end, end, start + 1.0)
    t = jnp.clip(start + u * (stop - start), low, high)
  return t / NUM_TRAIN_TIMESTEPS


def uniform_sigma(
  key: jax.Array,
  samples: int | jax.Array,
  *,
  low: float = 0.0,
  high: float = 1000.0,
  shift: float = 1.0,
) -> jax.Array:
  """[B] sigmas, uniform between two raw timesteps and then statically shifted."""
  return _from_fraction(_per_sample(jax.random.uniform, key, samples), low, high, shift)


def logit_normal_sigma(
  key: jax.Array,
  samples: int | jax.Array,
  *,
  mean: float = 0.0,
  std: float = 1.0,
  low: float = 0.0,
  high: float = 1000.0,
  shift: float = 1.0,
) -> jax.Array:
  """[B] sigmas of SD3's training density (arXiv 2403.03206, eq. 19).

  `sigmoid(mean + std n)`, n standard normal, spread over [low, high] raw timesteps, then
  statically shifted. A positive mean favours noisy levels, as in the paper.
  """
  u = jax.nn.sigmoid(mean + std * _per_sample(jax.random.normal, key, samples))
  return _from_fraction(u, low, high, shift)


def _from_fraction(u: jax.Array, low: float, high: float, shift: float) -> jax.Array:
  return static_shift((low + u * (high - low)) / NUM_TRAIN_TIMESTEPS, shift)


def consistency_steps(
  key: jax.Array, moves: int, samples: int | jax.Array, *, epsilon: int = 200
) -> jax.Array:
  """Sizes of the consistency regulariser's moves back: UniformInt{1..epsilon} timesteps.

  Returns:
    [M, B] float32 in sigma units, M = `moves`; the loss bounds the level itself by 0.
  """

  def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.randint(key, shape, 1, epsilon + 1)

  return _per_sample(draw, key, samples, moves).T.astype(jnp.float32) / NUM_TRAIN_TIMESTEPS


def adjacent_steps(sigma_t: jax.Array, sigmas: jax.Array, moves: int) -> jax.Array:
  """Moves back to the next lower points of a schedule (the pairing that RTDMD prints).

  Args:
    sigma_t: [B] levels to start from.
    sigmas: [K + 1] decreasing schedule with the final 0.
    moves: M; a level that has reached 0 stays there.

  Returns:
    [M, B] float32 sizes in sigma units.
  """
  level = jnp.asarray(sigma_t, jnp.float32)
  deltas = []
  for _ in range(moves):
    lower = jnp.max(jnp.where(sigmas[:, None] < level[None], sigmas[:, None], 0.0), axis=0)
    deltas.append(level - lower)
    level = lower
  return jnp.stack(deltas)


def random_stop(key: jax.Array, steps: int) -> jax.Array:
  """The rollout's stop, Uniform{1..steps}: one [] int32 for the whole global batch."""
  return jax.random.randint(key, (), 1, steps + 1)


def guidance_scale(key: jax.Array, low: float, high: float) -> jax.Array:
  """The teacher's guidance, uniform on [low, high]: one [] float32 for the whole global batch."""
  return jax.random.uniform(key, (), minval=low, maxval=high)
