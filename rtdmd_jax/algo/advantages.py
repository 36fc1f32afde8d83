"""Group-relative advantages over the global batch (RTDMD, arXiv 2605.26108; Flow-GRPO)."""

import jax
import jax.numpy as jnp

# Added to every standard deviation, as published.
STD_OFFSET = 1e-4


def _groups(prompt_ids: jax.Array) -> jax.Array:
  """Group index in 0..N-1 of each sample, [N]."""
  n = prompt_ids.shape[0]
  return jnp.unique(prompt_ids, return_inverse=True, size=n)[1].reshape(n)


def _mean(values: jax.Array, valid: jax.Array, groups: jax.Array | None) -> jax.Array:
  """Mean of the valid values of each sample's group, or of all ([N] or []); 0 without any."""
  values = jnp.where(valid, values, 0.0)
  valid = valid.astype(jnp.float32)
  if groups is None:
    return jnp.sum(values) / jnp.maximum(jnp.sum(valid), 1.0)
  total, count = (
    jax.ops.segment_sum(a, groups, num_segments=groups.shape[0]) for a in (values, valid)
  )
  return (total / jnp.maximum(count, 1.0))[groups]


def _std(values: jax.Array, valid: jax.Array, groups: jax.Array | None) -> jax.Array:
  """Population standard deviation, like `_mean`."""
  return jnp.sqrt(_mean(jnp.square(values - _mean(values, valid, groups)), valid, groups))


def _normalize(
  reward: jax.Array, groups: jax.Array, per_prompt: bool, global_std: bool
) -> jax.Array:
  """One reward's advantages [N]; 0 where the reward is not finite."""
  valid = jnp.isfinite(reward)
  reward = jnp.where(valid, reward, 0.0)
  mean = _mean(reward, valid, groups if per_prompt else None)
  std = _std(reward, valid, groups if per_prompt and not global_std else None)
  return jnp.where(valid, (reward - mean) / (std + STD_OFFSET), 0.0)


def _stack(rewards: dict[str, jax.Array], weights: dict[str, float]) -> dict[str, jax.Array]:
  """The rewards that have a weight, float32."""
  missing = sorted(set(weights) - set(rewards))
  if missing or not weights:
    raise ValueError(f"weights {sorted(weights)} need rewards, missing {missing}")
  return {name: jnp.asarray(rewards[name], jnp.float32) for name in weights}


def _weighted(weight: float, values: jax.Array) -> jax.Array:
  """`weight * values`; 0 for weight 0, also where values are missing."""
  return jnp.where(jnp.asarray(weight) == 0, 0.0, weight * values)


def group_advantages(
  rewards: dict[str, jax.Array],
  prompt_ids: jax.Array,
  weights: dict[str, float],
  *,
  per_prompt: bool = True,
  global_std: bool = True,
  weight_advantages: bool = True,
) -> jax.Array:
  """Advantages of the samples of one epoch's global batch.

  Standard deviations are population ones with 1e-4 added. A reward that is not finite is left out
  of all statistics: with `weight_advantages` it adds 0 to its sample, and a sample without any
  finite reward has advantage 0; otherwise a sample with a missing reward has advantage 0.

  Args:
    rewards: [N] per name; names without a weight are ignored.
    prompt_ids: [N] integers, equal for the samples of one prompt.
    weights: weight per reward name.
    per_prompt: subtract the group's mean; otherwise the batch's.
    global_std: divide by the deviation of the batch; otherwise of the group (with `per_prompt`).
    weight_advantages: normalise each reward, sum with the weights, and normalise the sum over the
      batch; otherwise normalise the weighted sum of rewards once.

  Returns:
    [N] float32.

  Raises:
    ValueError: no weights, or a weight without a reward.
  """
  rewards = _stack(rewards, weights)
  groups = _groups(prompt_ids)
  if not weight_advantages:
    total = sum(_weighted(weights[name], reward) for name, reward in rewards.items())
    return _normalize(total, groups, per_prompt, global_std)
  total = sum(
    weights[name] * _normalize(reward, groups, per_prompt, global_std)
    for name, reward in rewards.items()
  )
  # A sample counts if a reward with a weight was given to it.
  given = [jnp.isfinite(r) & (jnp.asarray(weights[name]) != 0) for name, r in rewards.items()]
  valid = jnp.any(jnp.stack(given), axis=0)
  return _normalize(jnp.where(valid, total, jnp.nan), groups, per_prompt=False, global_std=True)


def signal_mask(
  rewards: dict[str, jax.Array], prompt_ids: jax.Array, weights: dict[str, float]
) -> jax.Array:
  """Which samples carry a policy gradient: [N] bool, from the spread of the group's rewards.

  False where every weighted reward is constant within the sample's group, or missing for the
  sample. The advantages themselves cannot tell: a second centring turns their zeros into rounding
  noise.
  """
  rewards = _stack(rewards, weights)
  groups = _groups(prompt_ids)
  n = groups.shape[0]
  mask = jnp.zeros((n,), bool)
  for name, reward in rewards.items():
    valid = jnp.isfinite(reward)
    high = jax.ops.segment_max(jnp.where(valid, reward, -jnp.inf), groups, num_segments=n)[groups]
    low = jax.ops.segment_min(jnp.where(valid, reward, jnp.inf), groups, num_segments=n)[groups]
    mask |= valid & (high > low) & (jnp.asarray(weights[name]) != 0)
  return mask
