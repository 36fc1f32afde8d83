"""Settings that a run takes although they have no effect in it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from rtdmd_jax.config import flatten
from rtdmd_jax.training.settings import Consistency, DMDConfig, OptimizerConfig, PolicyConfig
from rtdmd_jax.training.validate import has_slope


class Rule(NamedTuple):
  """Keys (or whole sections) that a run does not read `when` a condition holds, and the reason."""

  keys: tuple[str, ...]
  when: Callable[[Any], bool]
  reason: str


# A key with its default has not been set on purpose, so nothing is said of it. Where a key has none
# (learning_rate), its value says nothing either.
_DEFAULTS: dict[str, Any] = {
  "ema.warmup": False,
  "ema.applications": 1,
  "log.wandb_project": "rtdmd_jax",
  "train.fake_update_ratio": 1,  # of stage 2
  "train.profile_start": 10,
}
for _section, _class in (
  ("dmd", DMDConfig),
  ("dmd.consistency", Consistency),
  ("fake_score", OptimizerConfig),
  ("policy", PolicyConfig),
):
  _DEFAULTS |= {f"{_section}.{key}": value for key, value in _class._field_defaults.items()}
del _DEFAULTS["dmd.consistency"]

_PATHS = ("max_steps_back", "transitions", "two_sample", "stop_transitions", "adjacent")
_CONSISTENCY = tuple(f"dmd.consistency.{key}" for key in _PATHS)
_AMBIENT = ("start_mode", "boundary_index", "offset", "end", "inside", "scale_out")
_MATCHING = tuple(key for key in _DEFAULTS if key.startswith("dmd.") and key != "dmd.eta")


def _plain(config: Any) -> bool:
  return config.dmd.objective == "dmd"


def _unmatched(config: Any) -> bool:
  return config.stage == "stage2" and not config.policy.dmd_weight


def _matched(when: Callable[[Any], bool]) -> Callable[[Any], bool]:
  """`when`, but where distribution matching is off altogether another rule speaks."""
  return lambda config: not _unmatched(config) and when(config)


def _in_stage2(when: Callable[[Any], bool]) -> Callable[[Any], bool]:
  return lambda config: config.stage == "stage2" and when(config)


_RULES = (
  Rule(
    (*_MATCHING, "fake_score", "train.fake_update_ratio"),
    _unmatched,
    "policy.dmd_weight is 0, so that no distribution is matched and no fake score trained",
  ),
  Rule(
    (*(f"dmd.{key}" for key in _AMBIENT), "dmd.weight_low", "dmd.weight_high", "dmd.consistency"),
    _matched(_plain),
    "only dmd.objective=ac_dmd reads it",
  ),
  Rule(
    ("dmd.boundary_index",),
    _matched(lambda c: not _plain(c) and c.dmd.start_mode != "fixed_boundary"),
    "only dmd.start_mode=fixed_boundary reads it",
  ),
  Rule(
    ("dmd.min_step", "dmd.max_step"),
    _matched(lambda c: not _plain(c) and c.dmd.inside),
    "dmd.inside=true draws levels from the open interval and clamps none",
  ),
  Rule(
    _CONSISTENCY,
    _matched(lambda c: not _plain(c) and not c.dmd.consistency.weight),
    "dmd.consistency.weight is 0",
  ),
  Rule(
    ("dmd.consistency.max_steps_back",),
    _matched(lambda c: not _plain(c) and c.dmd.consistency.weight and c.dmd.consistency.adjacent),
    "dmd.consistency.adjacent=true takes the points of the schedule",
  ),
  Rule(
    tuple(
      f"policy.{key}"
      for key in ("advantage_limit", "kl_weight", "subset_factor", "gaussian_log_prob")
    ),
    _in_stage2(lambda c: not c.policy.policy_weight),
    "policy.policy_weight is 0",
  ),
  Rule(
    ("policy.reward_margin", "policy.reward_weight"),
    _in_stage2(lambda c: not has_slope(c)),
    "no reward with a weight is back-propagated",
  ),
  Rule(
    ("policy.reward_margin",),
    _in_stage2(lambda c: has_slope(c) and not c.policy.reward_weight),
    "no reward is back-propagated, as policy.reward_weight is 0",
  ),
  Rule(
    ("policy.per_prompt", "policy.global_std"),
    _in_stage2(lambda c: c.batch.images_per_prompt == 1),
    "batch.images_per_prompt is 1, so that mean and deviation are those of the batch",
  ),
  Rule(
    ("policy.global_std",),
    _in_stage2(lambda c: c.batch.images_per_prompt > 1 and not c.policy.per_prompt),
    "policy.per_prompt is false, so that the deviation is that of the batch",
  ),
  Rule(("ema.warmup", "ema.applications"), lambda c: not c.ema.decay, "ema.decay is 0"),
  Rule(("train.profile_start",), lambda c: not c.train.profile_steps, "train.profile_steps is 0"),
  Rule(("log.wandb_project",), lambda c: not c.log.wandb, "log.wandb is false"),
)


def settings_without_effect(config: Any) -> list[str]:
  """One sentence a reason for the keys that were set and that the run does not read.

  Args:
    config: the configuration of stage 1 or 2, each of whose values `validate` permits.

  Returns:
    Sentences that name keys, their values and the reason; keys with their default are left out.
  """
  values = dict(flatten(config.to_dict()))
  sentences = []
  for rule in _RULES:
    if not rule.when(config):
      continue
    keys = [
      key
      for key in values
      if any(key == name or key.startswith(f"{name}.") for name in rule.keys)
      and values[key] != _DEFAULTS.get(key, values[key])
    ]
    sentences += _sentence(keys, values, rule.reason)
  for reason, unread in (
    ("stage 1 trains on no reward", config.stage == "stage1"),
    ("policy.reward_weight is 0", config.stage == "stage2" and not config.policy.reward_weight),
  ):
    if unread:
      keys = [f"rewards.{name}.backpropagate" for name in config.rewards]
      sentences += _sentence([key for key in keys if values.get(key)], values, reason)
  return sentences


def _sentence(keys: list[str], values: dict[str, Any], reason: str) -> list[str]:
  """The sentence about `keys`, or none without keys."""
  if not keys:
    return []
  verb = "has" if len(keys) == 1 else "have"
  return [f"{', '.join(f'{key}={values[key]!r}' for key in keys)} {verb} no effect: {reason}."]
