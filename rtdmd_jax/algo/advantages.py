"""Group-relative advantages over the global batch (RTDMD, arXiv 2605.26108; Flow-GRPO)."""

from typing import Any

import jax
import jax.numpy as jnp

# Added to every standard deviation, as published.
STD_OFFSET = 1e-4
# Beyond this the squares of a batch overflow float32, and with them every advantage of the reward.
LARGEST = 1e15


def usable(reward: jax.Array) -> jax.Array:
  """Which scores [N] enter the statistics: finite ones up to `LARGEST` in magnitude, bool [N]."""
  return jnp.abs(reward) <= LARGEST


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
  valid = usable(reward)
  reward = jnp.where(valid, reward, 0.0)
  mean = _mean(reward, valid, groups if per_prompt else None)
  std = _std(reward, valid, groups if per_prompt and not global_std else None)
  return jnp.where(valid, (reward - mean) / (std + STD_OFFSET), 0.0)


def _normalized_values(
  rewards: dict[str, jax.Array], weights: dict[str, float], weight_advantages: bool
) -> dict[str, tuple[float, jax.Array]]:
  """The values to normalise over the batch, rewards or their sum, as (weight, float32 [N])."""
  missing = sorted(set(weights) - set(rewards))
  if missing or not weights:
    raise ValueError(f"weights {sorted(weights)} need rewards, missing {missing}")
  values = {
    name: (weight, jnp.asarray(rewards[name], jnp.float32)) for name, weight in weights.items()
  }
  if weight_advantages:
    return values
  total: Any = sum(_weighted(*pair) for pair in values.values())
  return {"sum": (1.0, total)}


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

  Standard deviations are population ones with 1e-4 added. A reward that is not `usable` is left out
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
  values = _normalized_values(rewards, weights, weight_advantages)
  groups = _groups(prompt_ids)
  if not weight_advantages:
    return _normalize(values["sum"][1], groups, per_prompt, global_std)
  total = sum(
    weight * _normalize(reward, groups, per_prompt, global_std)
    for weight, reward in values.values()
  )
  # A sample counts if a reward with a weight was given to it.
  given = [usable(reward) & (jnp.asarray(weight) != 0) for weight, reward in values.values()]
  valid = jnp.any(jnp.stack(given), axis=0)
  return _normalize(jnp.where(valid, total, jnp.nan), groups, per_prompt=False, global_std=True)


def signal_mask(
  rewards: dict[str, jax.Array],
  prompt_ids: jax.Array,
  weights: dict[str, float],
  *,
  per_prompt: bool = True,
  weight_advantages: bool = True,
) -> jax.Array:
  """Which samples carry a policy gradient: [N] bool, from the spread of the rewards.

  False where whatever `group_advantages` normalises with the same settings is constant around the
  sample's baseline (its group with `per_prompt`, else the batch), or missing for the sample. The
  advantages themselves cannot tell: a second centring turns their zeros into rounding noise.
  """
  values = _normalized_values(rewards, weights, weight_advantages)
  groups = _groups(prompt_ids) if per_prompt else jnp.zeros(prompt_ids.shape, jnp.int32)
  n = prompt_ids.shape[0]
  mask = jnp.zeros((n,), bool)
  for weight, reward in values.values():
    valid = usable(reward)
    high = jax.ops.segment_max(jnp.where(valid, reward, -jnp.inf), groups, num_segments=n)[groups]
    low = jax.ops.segment_min(jnp.where(valid, reward, jnp.inf), groups, num_segments=n)[groups]
    mask |= valid & (high > low) & (jnp.asarray(weight) != 0)
  return mask
