"""Which values the keys of a configuration may have, whatever else they are combined with."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.lora import DTYPES, INITS
from rtdmd_jax.weights.int8 import STORAGES

Rule = tuple[Callable[[Any], bool], str]

_COUNT: Rule = (lambda v: v >= 1, "a whole number from 1")
_NATURAL: Rule = (lambda v: v >= 0, "a whole number from 0")
_POSITIVE: Rule = (lambda v: 0 < v < math.inf, "a number above 0")
_NOT_NEGATIVE: Rule = (lambda v: 0 <= v < math.inf, "a number from 0")
_FRACTION: Rule = (lambda v: 0 <= v <= 1, "a number from 0 to 1")
_DECAY: Rule = (lambda v: 0 <= v < 1, "a number from 0 up to, not including, 1")
_BOOL: Rule = (lambda v: isinstance(v, bool), "true or false")
_SEED: Rule = (lambda v: 0 <= v < 2**32, "a whole number from 0 to 4294967295")
_LEVELS: Rule = (
  lambda v: len(v) > 0 and all(0 < t <= 1000 for t in v) and list(v) == sorted(set(v))[::-1],
  "decreasing numbers above 0 and up to 1000, at least one",
)
_RULES: dict[str, Rule] = {
  "seed": _SEED,
  "model.dtype": (lambda v: _is_float(v), "a floating-point type such as bfloat16 or float32"),
  "model.base_storage": (lambda v: v in STORAGES, f"one of {', '.join(STORAGES)}"),
  "model.offload": _BOOL,
  "model.image_size": _COUNT,
  "lora.rank": _COUNT,
  "lora.alpha": _POSITIVE,
  "lora.init": (lambda v: v in INITS, f"one of {', '.join(INITS)}"),
  "lora.dtype": (lambda v: v in DTYPES, f"one of {', '.join(DTYPES)}"),
  "lora.targets": (len, "at least one name"),
  "dmd.steps": _LEVELS,
  "dmd.eta": _FRACTION,
  "ema.decay": _DECAY,
  "ema.every": _COUNT,
  "batch.prompts": _COUNT,
  "batch.repeats": _COUNT,
  "train.steps": _NATURAL,
  "train.fake_update_ratio": _COUNT,
  "train.log_every": _COUNT,
  "train.save_every": _COUNT,
  "train.keep": _COUNT,
  "train.keep_every": _NATURAL,
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


def check_limits(config: Any) -> None:
  """Checks each value of a training configuration by itself, and those that rule each other out.

  Args:
    config: as `load_config` returns it, so that types are right already.

  Raises:
    UserError: a section or key is missing, or the first value that no run can use.
  """
  for key, (fits, words) in _RULES.items():
    section = config
    for part in key.split("."):
      if part not in section:
        raise UserError(f"the configuration has no {key}; it must be {words}.")
      section = section[part]
    if not fits(section):
      raise UserError(f"{key} is {section!r}; it must be {words}.")
  if config.model.offload and config.model.base_storage != "native":
    raise UserError(
      "model.offload is true and model.base_storage is 'int8', whose stacks the TPU compiler brings"
      " back to the device as a whole; use one of the two."
    )
  if config.model.offload and config.model.remat == "none":
    raise UserError(
      "model.offload is true and model.remat is 'none', which keeps a copy of every block on the"
      " device for the backward pass; set model.remat to 'full' or 'dots'."
    )
  _check_steps(config)


def _check_steps(config: Any) -> None:
  """Whether what happens every so many steps happens in a run at all."""
  needed = {"ema.every": "the moving average, which is exported, would stay at its start"}
  if config.stage == "stage1":
    needed["train.fake_update_ratio"] = "the generator would never be updated"
  for key, words in needed.items():
    section, name = key.split(".")
    if 0 < config.train.steps < config[section][name]:
      raise UserError(
        f"{key} is {config[section][name]} and train.steps is {config.train.steps}, so {words};"
        f" lower {key} or raise train.steps."
      )


def _is_float(name: str) -> bool:
  try:
    return bool(jnp.issubdtype(jnp.dtype(name), jnp.floating))
  except TypeError:
    return False
