"""Losses of RTDMD (arXiv 2605.26108): arrays and velocities in, float32 scalars out."""

import jax
import jax.numpy as jnp

from rtdmd_jax.algo.rollout import Velocity, batched
from rtdmd_jax.algo.transitions import (
  add_noise,
  ambient_target,
  cps_step,
  expand,
  per_sample_mean,
  renoise,
  x0_from_v,
)


def weighted_mean(values: jax.Array, weights: jax.Array | None) -> jax.Array:
  """`mean(weights * values)` over samples [N]; no weights are ones.

  The divisor is N, not the weights' sum. A value of weight 0 may be anything, also not finite.
  """
  if weights is None:
    return jnp.mean(values)
  return jnp.mean(jnp.where(weights == 0, 0.0, weights * values))


def dmd_loss(
  x: jax.Array,
  x_fake: jax.Array,
  x_real: jax.Array,
  *,
  normalize: bool = True,
  weights: jax.Array | None = None,
) -> jax.Array:
  """Distribution-matching loss whose gradient with respect to x is `g / x.size`.

  `g = (x_fake - x_real) / mean |x - x_real|`, the mean per sample. The normaliser has no epsilon:
  0/0 counts as 0 and a non-zero numerator over 0 as the largest float, as in the published code.

  Args:
    x: [B, ...] generated sample, the only argument that gets a gradient.
    x_fake: [B, ...] the fake score's prediction of it.
    x_real: [B, ...] the teacher's.
    normalize: divide by the mean distance to the teacher's prediction.
    weights: [B] of the samples, see `weighted_mean`.

  Returns:
    `0.5 * mean (x - stopgrad(x - g))^2`, [].
  """
  x, x_fake, x_real = (jnp.asarray(a, jnp.float32) for a in (x, x_fake, x_real))
  constant = jax.lax.stop_gradient(x)
  g = x_fake - x_real
  if normalize:
    g = g / expand(per_sample_mean(jnp.abs(constant - x_real)), x)
  g = jax.lax.stop_gradient(jnp.nan_to_num(g))
  # Expanded, so that g is neither rounded to x's spacing nor doubled past the largest float.
  return weighted_mean(per_sample_mean(0.5 * jnp.square(g) + (x - constant) * g), weights)


def inverse_scale_weight(scale: jax.Array, low: float, high: float) -> jax.Array:
  """`1 / scale^2` clamped to [low, high], elementwise; a NaN scale has weight 0."""
  scale = jnp.asarray(scale, jnp.float32)
  weight = jnp.clip(1.0 / jnp.maximum(jnp.square(scale), 1e-12), low, high)
  return jnp.nan_to_num(weight, nan=0.0, posinf=high, neginf=low)


def fake_score_loss(
  v: jax.Array,
  target: jax.Array,
  scale: jax.Array,
  *,
  weight_low: float = 0.0,
  weight_high: float = 10.0,
) -> jax.Array:
  """`mean( clamp(1 / scale^2) (scale v - target)^2 )` over an `ambient_target`.

  Args:
    v: [B, ...] predicted velocity.
    target: [B, ...].
    scale: [], [B] or [B, 1, ...].
    weight_low: lower clamp of the weight.
    weight_high: upper clamp of the weight.
  """
  v, target = jnp.asarray(v, jnp.float32), jnp.asarray(target, jnp.float32)
  scale = expand(scale, v)
  weight = inverse_scale_weight(scale, weight_low, weight_high)
  return jnp.mean(weight * jnp.square(scale * v - target))


def flow_matching_loss(
  v: jax.Array, x0: jax.Array, noise: jax.Array, weight: jax.Array | float = 1.0
) -> jax.Array:
  """`mean( weight (v - (noise - x0))^2 )`, the ordinary flow-matching loss; weight [] or [B]."""
  v = jnp.asarray(v, jnp.float32)
  target = jnp.asarray(noise, jnp.float32) - jnp.asarray(x0, jnp.float32)
  return jnp.mean(expand(weight, v) * jnp.square(v - target))


def consistency_loss(anchor: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
  """`mean (first - anchor)(second - anchor)`: an unbiased estimate of a squared bias.

  The ends' independent noise makes the expectation the squared violation of self-consistency, so
  a single value may be negative. Everything is differentiated. A non-finite result counts as 0.

  Args:
    anchor: [B, ...] clean prediction at the later level.
    first: [B, ...] clean prediction at the earlier level along one path.
    second: [B, ...] the same along an independent path; passing `first` again gives the one-sample
      mean squared error.
  """
  anchor = jnp.asarray(anchor, jnp.float32)
  one, two = jnp.asarray(first, jnp.float32) - anchor, jnp.asarray(second, jnp.float32) - anchor
  usable = jnp.isfinite(jnp.mean(one * two))
  # Select before the product, so that the gradient of an unusable value is 0 as well.
  return jnp.mean(jnp.where(usable, one, 0.0) * jnp.where(usable, two, 0.0))


def clipped_policy_loss(
  log_prob: jax.Array,
  old_log_prob: jax.Array,
  advantage: jax.Array,
  *,
  clip_low: float,
  clip_high: float,
  limit: float,
  weights: jax.Array | None = None,
) -> jax.Array:
  """`mean max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))`, `r = exp(log_prob - old)`.

  For an on-policy update pass `old_log_prob = stop_gradient(log_prob)`: the ratio is exactly 1.

  Args:
    log_prob: [N] under the policy being trained.
    old_log_prob: [N] under the policy that sampled.
    advantage: [N], clamped to +-limit here.
    clip_low: how far below 1 the ratio counts.
    clip_high: how far above 1 the ratio counts.
    limit: bound of the advantage.
    weights: [N] of the samples, see `weighted_mean`.
  """
  advantage = jnp.clip(jnp.asarray(advantage, jnp.float32), -limit, limit)
  ratio = jnp.exp(jnp.asarray(log_prob, jnp.float32) - jnp.asarray(old_log_prob, jnp.float32))
  clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
  return weighted_mean(jnp.maximum(-advantage * ratio, -advantage * clipped), weights)


def kl_to_reference(
  mean: jax.Array, mean_ref: jax.Array, std: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
  """`mean (mean - mean_ref)^2 / (2 std^2)`: KL of two transitions of equal deviation, per element.

  Args:
    mean: [B, ...] of the policy's transition.
    mean_ref: [B, ...] of the reference's, not differentiated.
    std: positive, [] or [B].
    weights: [B] of the samples, see `weighted_mean`.
  """
  mean = jnp.asarray(mean, jnp.float32)
  mean_ref = jax.lax.stop_gradient(jnp.asarray(mean_ref, jnp.float32))
  kl = jnp.square(mean - mean_ref) / (2.0 * jnp.square(expand(std, mean)))
  return weighted_mean(per_sample_mean(kl), weights)


def reward_hinge(reward: jax.Array, margin: float, weights: jax.Array | None = None) -> jax.Array:
  """`mean relu(margin - reward)` over differentiable rewards [B]; weights as in `weighted_mean`."""
  return weighted_mean(jax.nn.relu(margin - jnp.asarray(reward, jnp.float32)), weights)


def generator_loss(
  x_s: jax.Array,
  sigma_s: jax.Array,
  sigma_t: jax.Array,
  noise: jax.Array,
  transition_noise: jax.Array,
  teacher_velocity: Velocity,
  fake_velocity: Velocity,
  *,
  eta: float,
  normalize: bool = True,
  weights: jax.Array | None = None,
) -> jax.Array:
  """Sub-interval distribution matching (RTDMD, AC-DMD generator update).

  Renoises x_s to t, lets teacher and fake score predict there, carries both back to s with the
  same transition noise and applies `dmd_loss`. That noise cancels in the direction and stays in
  the normaliser, as published. Only the x_s of `dmd_loss` is differentiated.

  Args:
    x_s: [B, ...] generated sample at level s.
    sigma_s: start level, [] or [B].
    sigma_t: renoise level, [] or [B].
    noise: [B, ...] of the renoising.
    transition_noise: [B, ...] shared by both moves back.
    teacher_velocity: `(x [B, ...], sigma [B]) -> v`, guidance inside.
    fake_velocity: likewise.
    eta: stochasticity of the moves back.
    normalize: see `dmd_loss`.
    weights: [B] of the samples, see `weighted_mean`.
  """
  constant = jax.lax.stop_gradient
  start = constant(jnp.asarray(x_s, jnp.float32))
  x_t = renoise(start, noise, sigma_s, sigma_t)
  level = batched(sigma_t, x_t)

  def move_back(velocity: Velocity) -> jax.Array:
    v = constant(velocity(x_t, level))
    return constant(cps_step(x_t, v, level, sigma_s, eta, transition_noise))

  fake, real = move_back(fake_velocity), move_back(teacher_velocity)
  return dmd_loss(x_s, fake, real, normalize=normalize, weights=weights)


def plain_generator_loss(
  x0: jax.Array,
  sigma_t: jax.Array,
  noise: jax.Array,
  teacher_velocity: Velocity,
  fake_velocity: Velocity,
  *,
  normalize: bool = True,
  weights: jax.Array | None = None,
) -> jax.Array:
  """Distribution matching of clean samples (DMD2, arXiv 2405.14867): `dmd_loss` on x0 predictions.

  Args:
    x0: [B, ...] generated clean sample, the only differentiated argument.
    sigma_t: level of the ordinary renoising, [] or [B].
    noise: [B, ...].
    teacher_velocity: `(x [B, ...], sigma [B]) -> v`, guidance inside.
    fake_velocity: likewise.
    normalize: see `dmd_loss`.
    weights: [B] of the samples, see `weighted_mean`.
  """
  constant = jax.lax.stop_gradient
  x_t = constant(add_noise(x0, noise, sigma_t))
  level = batched(sigma_t, x_t)
  fake, real = (
    constant(x0_from_v(x_t, velocity(x_t, level), level))
    for velocity in (fake_velocity, teacher_velocity)
  )
  return dmd_loss(x0, fake, real, normalize=normalize, weights=weights)


def ambient_fake_score_loss(
  fake_velocity: Velocity,
  x_s: jax.Array,
  sigma_s: jax.Array,
  sigma_t: jax.Array,
  noise: jax.Array,
  *,
  scale_out: bool = True,
  weight_low: float = 0.0,
  weight_high: float = 10.0,
  consistency_weight: float = 0.0,
  steps_back: jax.Array | None = None,
  transition_noise: jax.Array | None = None,
  eta: float = 0.9,
  two_sample: bool = True,
  stop_transitions: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Ambient fake-score loss plus the consistency regulariser (RTDMD, AC-DMD fake-score update).

  The regulariser walks from the renoised sample down `steps_back` (levels bounded by 0, not by s)
  along two paths that share levels but not noise. The first move reuses the anchor's velocity,
  later ones evaluate the fake score again; anchor and both ends are differentiated.

  Args:
    fake_velocity: `(x [B, ...], sigma [B]) -> v`; gradients flow into what it closes over.
    x_s: [B, ...] sample at level s, not differentiated.
    sigma_s: start level, [] or [B].
    sigma_t: renoise level, [] or [B].
    noise: [B, ...] of the renoising.
    scale_out: see `ambient_target`.
    weight_low: lower clamp of the weight.
    weight_high: upper clamp of the weight.
    consistency_weight: gamma.
    steps_back: [M, B] sizes of M chained moves in sigma units; None leaves the regulariser out.
    transition_noise: [2, M, B, ...]; one path's noise, [1, M, B, ...], suffices for one sample.
    eta: stochasticity of the moves.
    two_sample: the unbiased estimate; otherwise the mean squared error along the first path.
    stop_transitions: no gradient through the paths.

  Returns:
    (total [], {"fake_score": [], "consistency": []}), the parts unweighted.

  Raises:
    ValueError: a positive weight, or steps, without their counterparts.
  """
  has_steps = steps_back is not None
  if has_steps != (transition_noise is not None):
    raise ValueError("steps_back and transition_noise go together")
  if not has_steps and not (isinstance(consistency_weight, int | float) and not consistency_weight):
    raise ValueError("a consistency weight needs steps_back and transition_noise")
  x_s = jax.lax.stop_gradient(jnp.asarray(x_s, jnp.float32))
  x_t = renoise(x_s, noise, sigma_s, sigma_t)
  target, scale = ambient_target(x_s, noise, sigma_s, sigma_t, scale_out=scale_out)
  level = batched(sigma_t, x_t)
  if not has_steps:
    v = fake_velocity(x_t, level).astype(jnp.float32)
    fake = fake_score_loss(v, target, scale, weight_low=weight_low, weight_high=weight_high)
    return fake, {"fake_score": fake, "consistency": jnp.zeros(())}

  assert steps_back is not None and transition_noise is not None
  path_sigmas = [level]
  for delta in steps_back:
    path_sigmas.append(jnp.maximum(path_sigmas[-1] - delta, 0.0))
  path_noise = transition_noise[: 2 if two_sample else 1]
  x, v = _walk_back(
    fake_velocity, x_t, jnp.stack(path_sigmas), path_noise, eta=eta, stop=stop_transitions
  )
  fake = fake_score_loss(v[0], target, scale, weight_low=weight_low, weight_high=weight_high)
  transitions = len(steps_back)
  anchor, *ends = (
    x0_from_v(x[i], v[i], path_sigmas[-1] if i else level) for i in range(0, len(x), transitions)
  )
  consistency = consistency_loss(anchor, ends[0], ends[-1])
  total = fake + consistency_weight * consistency
  return total, {"fake_score": fake, "consistency": consistency}


def _walk_back(
  velocity: Velocity,
  x: jax.Array,
  sigmas: jax.Array,
  noise: jax.Array,
  *,
  eta: float,
  stop: bool,
) -> tuple[jax.Array, jax.Array]:
  """Every point of P paths of M chained CPS transitions, with the velocity there.

  The paths start at the same point and visit the same sigmas with noise of their own. For P = 2 and
  M = 2 the points are numbered

                  0            x, at sigmas[0]
                /   \\
               1     3         at sigmas[1]
               |     |
               2     4         at sigmas[2]

  They are visited in this order by a loop, so that the network is compiled once and not for every
  point. Point n > 0 follows from point 0 where a path begins (n = 1, 1 + M, ...), else from
  point n - 1.

  Args:
    velocity: the network's.
    x: [B, ...] at the first sigma.
    sigmas: [M + 1, B].
    noise: [P, M, B, ...].
    eta: stochasticity of the transitions.
    stop: whether transitions have no gradient.

  Returns:
    (points, velocities), each [1 + P M, B, ...].
  """
  constant = jax.lax.stop_gradient if stop else lambda y: y
  paths, transitions = noise.shape[:2]

  def visit(carry: tuple, inputs: tuple) -> tuple[tuple, tuple]:
    (start, previous), (number, sigma, next_sigma, z) = carry, inputs
    is_start, begins_path = number == 0, (number - 1) % transitions == 0
    x, v = jax.tree.map(lambda a, b: jnp.where(begins_path, a, b), start, previous)
    x = jnp.where(is_start, start[0], cps_step(x, v, sigma, next_sigma, eta, z))
    point = (x, velocity(x, next_sigma).astype(jnp.float32))
    previous = jax.tree.map(constant, point)
    start = jax.tree.map(lambda a, b: jnp.where(is_start, a, b), previous, start)
    return (start, previous), point

  def for_every_point(start: jax.Array, others: jax.Array) -> jax.Array:
    return jnp.concatenate([start[None], others])

  inputs = (
    jnp.arange(1 + paths * transitions),
    for_every_point(sigmas[0], jnp.tile(sigmas[:-1], (paths, 1))),
    for_every_point(sigmas[0], jnp.tile(sigmas[1:], (paths, 1))),
    for_every_point(jnp.zeros_like(x), noise.reshape(-1, *x.shape)),
  )
  unvisited = (x, jnp.zeros_like(x))
  return jax.lax.scan(visit, (unvisited, unvisited), inputs)[1]
