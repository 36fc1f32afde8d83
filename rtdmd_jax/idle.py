"""Settings that a run takes, but that have no effect in it or train nothing."""

from collections.abc import Callable
from typing import Any

from rtdmd_jax.limits import ABSENT, has_slope, has_weight, lookup

# Keys that some configurations do not read: (key, its value in configs/common.py, when it is not
# read, and why).
_IDLE: tuple[tuple[str, Any, Callable[[Any], bool], str], ...] = (
  (
    "train.fake_update_ratio",
    10,
    lambda c: c.stage == "stage2",
    "stage 2 updates the fake score once a step",
  ),
  (
    "dmd.boundary_index",
    2,
    lambda c: c.dmd.start_mode != "fixed_boundary",
    "only dmd.start_mode=fixed_boundary reads it",
  ),
  (
    "policy.reward_margin",
    3.0,
    lambda c: not (c.policy.reward_weight and has_slope(c)),
    "no reward is back-propagated",
  ),
  (
    "policy.gaussian_log_prob",
    False,
    lambda c: not c.policy.policy_weight,
    "policy.policy_weight is 0",
  ),
)


def warnings(config: Any) -> list[str]:
  """A sentence for each setting that a run takes, but that has no effect or trains nothing.

  Args:
    config: one without `limits.violations`.
  """
  found = [
    f"{key} is {lookup(config, key)!r}, which has no effect: {reason}."
    for key, default, idle, reason in _IDLE
    if lookup(config, key) not in (default, ABSENT) and idle(config)
  ]
  found += _never(config)
  found += [
    f"{network}.learning_rate is 0: the {network.replace('_', ' ')} stays as it starts."
    for network in ("generator", "fake_score")
    if config[network].learning_rate == 0
  ]
  if config.stage != "stage2":
    return found
  policy = config.policy
  if policy.policy_weight and config.batch.repeats == 1 and policy.per_prompt:
    found.append(
      "batch.repeats is 1 and policy.per_prompt is true: a group of one image has no baseline of"
      " its own, so that of the batch takes its place; raise batch.repeats."
    )
  if policy.policy_weight and not has_weight(config):
    found.append("every reward has weight 0, so that the policy gradient is 0.")
  return found


def _never(config: Any) -> list[str]:
  """What happens every so many steps, and so not at all in a short run."""
  steps, every, ratio = config.train.steps, config.ema.every, config.train.fake_update_ratio
  found = []
  if 0 < steps < every:
    found.append(
      f"ema.every is {every} and train.steps is {steps}: the moving average stays at its start, so"
      " the adapters in training are exported."
    )
  if config.stage == "stage1" and 0 < steps < ratio:
    found.append(
      f"train.fake_update_ratio is {ratio} and train.steps is {steps}: the generator is never"
      " updated, and its export is the start."
    )
  return found
