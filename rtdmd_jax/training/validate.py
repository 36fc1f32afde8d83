"""Rules on the values of a configuration, of each by itself and beside the others."""

import math
from collections.abc import Callable, Iterator
from numbers import Integral
from typing import Any

import jax

from rtdmd_jax.adapters.lora import DTYPES, INITS
from rtdmd_jax.errors import UserError
from rtdmd_jax.models.attention import KERNELS
from rtdmd_jax.models.stack import REMAT_POLICIES
from rtdmd_jax.weights.int8 import STORAGES

STAGES = ("stage1", "stage2", "pretrain")
OBJECTIVES = ("ac_dmd", "dmd")
START_MODES = ("next_sigma", "fixed_boundary")
_COMPUTED = ("bfloat16", "float16", "float32", "float64")
Rule = tuple[Callable[[Any], bool], str]


def _one_of(names: Any) -> Rule:
  return (lambda v: v in names, f"one of {', '.join(names)}")


_COUNT: Rule = (lambda v: isinstance(v, Integral) and v >= 1, "a whole number from 1")
_NATURAL: Rule = (lambda v: isinstance(v, Integral) and v >= 0, "a whole number from 0")
_FINITE: Rule = (lambda v: math.isfinite(v), "a finite number")
_POSITIVE: Rule = (lambda v: 0 < v < math.inf, "a number above 0")
_NOT_NEGATIVE: Rule = (lambda v: 0 <= v < math.inf, "a number from 0")
_FRACTION: Rule = (lambda v: 0 <= v <= 1, "a number from 0 to 1")
_DECAY: Rule = (lambda v: 0 <= v < 1, "a number from 0 up to, not including, 1")
_BOOL: Rule = (lambda v: isinstance(v, bool), "true or false")
_SEED: Rule = (lambda v: 0 <= v < 2**32, "a whole number from 0 to 4294967295")
_TIMESTEP: Rule = (lambda v: 0 <= v <= 1000, "a number from 0 to 1000")
_LEVELS: Rule = (
  lambda v: len(v) > 0 and all(0 < t <= 1000 for t in v) and list(v) == sorted(set(v))[::-1],
  "decreasing numbers above 0 and up to 1000, at least one",
)
_RULES: dict[str, Rule] = {
  "seed": _SEED,
  "model.dtype": _one_of(_COMPUTED),
  "model.base_storage": _one_of(STORAGES),
  "model.offload": _BOOL,
  "model.remat": _one_of(REMAT_POLICIES),
  "model.attention": _one_of(KERNELS),
  "model.image_size": _COUNT,
  "lora.rank": _COUNT,
  "lora.alpha": _POSITIVE,
  "lora.init": _one_of(INITS),
  "lora.dtype": _one_of(DTYPES),
  "lora.targets": (len, "at least one name"),
  "data.cache_gb": _NOT_NEGATIVE,
  "dmd.timesteps": _LEVELS,
  "dmd.objective": _one_of(OBJECTIVES),
  "dmd.eta": _FRACTION,
  "dmd.guidance_low": _NOT_NEGATIVE,
  "dmd.guidance_high": _NOT_NEGATIVE,
  "dmd.start_mode": _one_of(START_MODES),
  "dmd.boundary_index": _COUNT,
  "dmd.offset": _TIMESTEP,
  "dmd.end": _TIMESTEP,
  "dmd.min_step": _TIMESTEP,
  "dmd.max_step": _TIMESTEP,
  "dmd.inside": _BOOL,
  "dmd.normalize": _BOOL,
  "dmd.scale_out": _BOOL,
  "dmd.weight_low": _NOT_NEGATIVE,
  "dmd.weight_high": _POSITIVE,
  "dmd.consistency.weight": _NOT_NEGATIVE,
  "dmd.consistency.max_steps_back": (
    lambda v: isinstance(v, Integral) and 1 <= v <= 1000,
    "a whole number from 1 to 1000",
  ),
  "dmd.consistency.transitions": _COUNT,
  "ema.decay": _DECAY,
  "ema.every": _COUNT,
  "ema.warmup": _BOOL,
  "ema.applications": _COUNT,
  "batch.prompts": _COUNT,
  "batch.images_per_prompt": _COUNT,
  "batch.micro_batches": _COUNT,
  "train.steps": _NATURAL,
  "train.fake_update_ratio": _COUNT,
  "train.log_every": _COUNT,
  "train.save_every": _COUNT,
  "train.keep": _COUNT,
  "train.keep_every": _NATURAL,
  "train.check_numbers": _BOOL,
  "train.max_skipped": _COUNT,
  "train.profile_start": _NATURAL,
  "train.profile_steps": _NATURAL,
  "train.grace_seconds": _POSITIVE,
  "eval.every": _COUNT,
  "eval.prompts": _COUNT,
  "eval.final_prompts": _COUNT,
  "eval.final_images": _COUNT,
  "eval.chunk": _COUNT,
  "eval.teacher_steps": _COUNT,
  "eval.teacher_guidance": _NOT_NEGATIVE,
  "eval.preview": _COUNT,
  "eval.seed": _SEED,
  "log.wandb": _BOOL,
}
for _network in ("generator", "fake_score"):
  _RULES |= {
    f"{_network}.learning_rate": _NOT_NEGATIVE,
    f"{_network}.warmup_steps": _NATURAL,
    f"{_network}.b1": _DECAY,
    f"{_network}.b2": _DECAY,
    f"{_network}.eps": _NOT_NEGATIVE,
    f"{_network}.weight_decay": _NOT_NEGATIVE,
    f"{_network}.clip_norm": _POSITIVE,
  }
_STAGE2_RULES: dict[str, Rule] = {
  "batch.decode_chunk": _NATURAL,
  "policy.num_train_steps": _COUNT,
  "policy.range_start": _NATURAL,
  "policy.range_end": _NATURAL,
  "policy.clip_low": (lambda v: 0 < v <= 1, "a number above 0, and at most 1"),
  "policy.clip_high": _POSITIVE,
  "policy.advantage_limit": _POSITIVE,
  "policy.kl_weight": _NOT_NEGATIVE,
  "policy.subset_factor": _BOOL,
  "policy.gaussian_log_prob": _BOOL,
  "policy.per_prompt": _BOOL,
  "policy.global_std": _BOOL,
  "policy.weight_advantages": _BOOL,
  "policy.policy_weight": _NOT_NEGATIVE,
  "policy.dmd_weight": _NOT_NEGATIVE,
  "policy.reward_weight": _NOT_NEGATIVE,
  "policy.reward_margin": _FINITE,
}
# Each first key must not be above the second; of the pairs below not even equal to it.
_ORDERED = (
  ("dmd.guidance_low", "dmd.guidance_high"),
  ("dmd.min_step", "dmd.max_step"),
  ("dmd.weight_low", "dmd.weight_high"),
)
_APART = (("dmd.offset", "dmd.end"), ("dmd.min_step", "dmd.end"))
ABSENT = object()


def check_stage(config: Any) -> None:
  """Checks that `rtdmd_jax.main` trains such a configuration.

  Raises:
    UserError: an unknown stage, or the configuration of another tool, which is named.
  """
  stage = config.get("stage")
  if stage in STAGES:
    return
  tool = "evaluate" if "systems" in config else "sample" if "pipeline" in config else None
  if stage is None and tool is not None:
    raise UserError(
      f"the configuration has no stage: it is one of rtdmd_jax.{tool}; run python -m"
      f" rtdmd_jax.{tool} with it, or give rtdmd_jax.main a configuration of a stage."
    )
  raise UserError(f"stage is {stage!r}; use one of {', '.join(STAGES[:-1])} or {STAGES[-1]}.")


def check_limits(config: Any) -> None:
  """Checks the values of a training configuration, without its files.

  Args:
    config: as `load_config` returns it.

  Raises:
    UserError: the first of `violations`.
  """
  for sentence in violations(config):
    raise UserError(sentence)


def violations(config: Any) -> list[str]:
  """A sentence for each section or key that is missing, and for each value that no run can use."""
  stage2 = config.get("stage") == "stage2"
  rules = _RULES | (_STAGE2_RULES if stage2 else {})
  values = {key: lookup(config, key) for key in (*rules, "rewards", "eval.rewards")}
  if absent := [key for key, value in values.items() if value is ABSENT]:
    words = {"rewards": "a section", "eval.rewards": "a section"}
    return [
      f"the configuration has no {key}; it must be {words.get(key) or rules[key][1]}."
      for key in absent
    ]
  sentences = [
    f"{key} is {values[key]!r}; it must be {words}."
    for key, (fits, words) in rules.items()
    if not _fits(fits, values[key])
  ]
  sentences += _rewards(config)
  for rule in (_pairs, _dtypes, _model, _boundary, *([_stage2] if stage2 else [])):
    try:
      sentences += rule(config)
    except (AttributeError, TypeError):  # values that cannot be compared are in the list already
      continue
  return sentences


def check_policy_steps(config: Any) -> None:
  """Checks that a rollout has the stochastic steps that `policy` chooses from.

  Raises:
    UserError: a range beyond the stochastic steps, all but the last of `dmd.timesteps`, or one of
      fewer steps than are to be trained.
  """
  policy, last = config.policy, len(config.dmd.timesteps) - 2
  if last < 0:
    raise UserError(
      "dmd.timesteps has one step, but stage 2 trains those before the last; give more."
    )
  if not 0 <= policy.range_start <= policy.range_end <= last:
    raise UserError(
      f"policy.range_start..range_end is {policy.range_start}..{policy.range_end}; stochastic"
      f" steps are 0..{last}."
    )
  count = policy.range_end - policy.range_start + 1
  if policy.num_train_steps > count:
    raise UserError(
      f"policy.num_train_steps is {policy.num_train_steps}, but policy.range_start..range_end is"
      f" {policy.range_start}..{policy.range_end}, which holds {count}; lower it."
    )


def lookup(config: Any, key: str) -> Any:
  """The value of a dotted key such as "dmd.eta"; `ABSENT` without one."""
  for part in key.split("."):
    if not hasattr(config, "keys") or part not in config:
      return ABSENT
    config = config[part]
  return config


def has_weight(config: Any) -> bool:
  """Whether a reward counts for the policy."""
  return any(reward.weight for reward in config.rewards.values())


def has_slope(config: Any) -> bool:
  """Whether a reward that counts is back-propagated."""
  return any(r.weight and r.get("backpropagate", False) for r in config.rewards.values())


def _fits(rule: Callable[[Any], bool], value: Any) -> bool:
  try:
    return bool(rule(value))
  except TypeError:  # not even comparable
    return False


def _rewards(config: Any) -> Iterator[str]:
  """Sections of the rewards, and the weights of those in training."""
  for place, rewards in (("rewards", config.rewards), ("eval.rewards", config.eval.rewards)):
    for name, options in rewards.items():
      if not hasattr(options, "keys"):
        yield f"{place}.{name} is {options!r}; it must be a section with the reward's options."
      elif place == "rewards" and not _is_number(options.get("weight")):
        weight = options.get("weight")
        yield f"rewards.{name}.weight is {weight!r}; it must be a finite number."
  if config.stage == "stage2" and not config.rewards:
    yield "rewards is empty, but stage 2 trains on a reward; name one with its weight."


def _is_number(value: Any) -> bool:
  return not isinstance(value, bool) and _fits(math.isfinite, value)


def _pairs(config: Any) -> Iterator[str]:
  for (low, high), apart in (*((p, False) for p in _ORDERED), *((p, True) for p in _APART)):
    a, b = lookup(config, low), lookup(config, high)
    if a > b or (apart and a == b):
      words = "below" if apart else "at most"
      yield f"{low} is {a!r} and {high} is {b!r}; the first must be {words} the second."


def _dtypes(config: Any) -> Iterator[str]:
  """Types that the platform lacks."""
  name = config.model.dtype
  if name == "float64" and not jax.config.jax_enable_x64:
    yield "model.dtype is 'float64', for which jax takes float32 here; use float32."
  if name == "float16" and jax.default_backend() == "tpu":
    yield "model.dtype is 'float16', in which TPUs do not compute; use bfloat16."


def _model(config: Any) -> Iterator[str]:
  if config.model.offload and config.model.base_storage != "native":
    yield (
      "model.offload is true and model.base_storage is 'int8', whose stacks the TPU compiler brings"
      " back to the device as a whole; use one of the two."
    )
  if config.model.offload and config.model.remat == "none":
    yield (
      "model.offload is true and model.remat is 'none', which keeps a copy of every block on the"
      " device for the backward pass; set model.remat to 'full' or 'dots'."
    )


def _boundary(config: Any) -> Iterator[str]:
  index, steps = config.dmd.boundary_index, len(config.dmd.timesteps)
  if config.dmd.start_mode == "fixed_boundary" and index > steps:
    yield f"dmd.boundary_index is {index}; with {steps} dmd.timesteps it must be in 1..{steps}."


def _stage2(config: Any) -> Iterator[str]:
  policy = config.policy
  try:
    check_policy_steps(config)
  except UserError as error:
    yield str(error)
  if not config.dmd.eta and policy.policy_weight:
    yield (
      "dmd.eta is 0, which makes every step deterministic, so that there is no policy gradient;"
      " raise dmd.eta, or set policy.policy_weight to 0."
    )
  # Both divide by the deviation of a step, and what is not finite stays so with weight 0.
  for key in ("kl_weight", "gaussian_log_prob"):
    if not config.dmd.eta and policy[key]:
      yield (
        f"dmd.eta is 0, but policy.{key} is {policy[key]!r}, which divides by the deviation of a"
        " step, then 0; raise dmd.eta, or switch it off."
      )
  if not (
    (policy.policy_weight and has_weight(config))
    or policy.dmd_weight
    or (policy.reward_weight and has_slope(config))
  ):
    yield (
      "nothing trains the generator: it takes policy.policy_weight with a reward of another weight"
      " than 0, policy.dmd_weight, or policy.reward_weight with a reward to back-propagate."
    )
