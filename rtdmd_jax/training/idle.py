"""Settings that a run takes, but that have no effect in it or train nothing."""

from typing import Any

from rtdmd_jax.training.unused_settings import settings_without_effect
from rtdmd_jax.training.validate import has_weight


def warnings(config: Any) -> list[str]:
  """A sentence for each setting that a run takes, but that has no effect or trains nothing.

  Args:
    config: the configuration, one without `validate.violations`.
  """
  sentences = settings_without_effect(config) + _never(config)
  sentences += [
    f"{network}.learning_rate is 0: the {network.replace('_', ' ')} stays as it starts."
    for network in ("generator", "fake_score")
    if config[network].learning_rate == 0
  ]
  if config.stage != "stage2":
    return sentences
  policy = config.policy
  if policy.policy_weight and config.batch.images_per_prompt == 1 and policy.per_prompt:
    sentences.append(
      "batch.images_per_prompt is 1 and policy.per_prompt is true: a group of one image has no"
      " baseline of its own, so that of the batch takes its place; raise batch.images_per_prompt."
    )
  if policy.policy_weight and not has_weight(config):
    sentences.append("every reward has weight 0, so that the policy gradient is 0.")
  return sentences


def _never(config: Any) -> list[str]:
  """Sentences about what happens every so many steps, and so not at all in a short run."""
  steps, every, ratio = config.train.steps, config.ema.every, config.train.fake_update_ratio
  sentences = []
  if 0 < steps < every:
    sentences.append(
      f"ema.every is {every} and train.steps is {steps}: the moving average stays at its start, so"
      " the adapters in training are exported."
    )
  if config.stage == "stage1" and 0 < steps < ratio:
    sentences.append(
      f"train.fake_update_ratio is {ratio} and train.steps is {steps}: the generator is never"
      " updated, and its export is the start."
    )
  return sentences
