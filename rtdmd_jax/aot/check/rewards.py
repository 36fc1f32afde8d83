"""Rewards: their options and files, and what they make of a grey image."""

import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rtdmd_jax.aot.check.files import Prompts, existing, there
from rtdmd_jax.aot.check.report import Report
from rtdmd_jax.aot.check.trial import try_reward
from rtdmd_jax.datasets.prompts import Prompt
from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards import device_rewards
from rtdmd_jax.rewards.backends.hpsv3 import HPSv3
from rtdmd_jax.rewards.backends.mask2former import Mask2FormerDetector
from rtdmd_jax.rewards.backends.pytorch import require_torch
from rtdmd_jax.rewards.backends.qwen3_vl import Qwen3VLAnswerer
from rtdmd_jax.rewards.held_out_sets import held_out_path, reward_sections
from rtdmd_jax.rewards.host.geneval2 import GenEval2
from rtdmd_jax.rewards.multi import RUN_KEYS
from rtdmd_jax.rewards.needs import check_training_prompts, shortage, unscorable
from rtdmd_jax.training.validate import lookup
from rtdmd_jax.weights.headers import headers_only
from rtdmd_jax.weights.reward_files import PATHS, option_kind

# Options of GenEval2's rule, beside those of the model that answers.
_RULE = ("aggregate", "questions")


def check_rewards(report: Report, config: Any, prompts: Prompts) -> None:
  """Checks every reward, trained or only evaluated, by itself and against its prompts."""
  for section, name, options in reward_sections(config):
    if section == "eval.rewards" and name in config.rewards:
      report.problem(f"eval.rewards.{name} is in rewards, too, and is evaluated as it is.")
      continue
    key = f"{section}.{name}"
    if options.get("backpropagate", False) and name not in device_rewards.NAMES:
      report.problem(
        f"{key}.backpropagate is true, but only {', '.join(device_rewards.NAMES)} have gradients."
      )
    own = {k: v for k, v in options.to_dict().items() if k not in RUN_KEYS}
    before = len(report.problems)
    if ":" not in name:
      own |= _paths(report, key, name, own)
    if len(report.problems) > before:  # nothing can be built of missing files
      continue
    usable = _scorable(report, config, section, name, prompts)
    _reward(report, key, name, own, config.model.image_size, usable)


def _reward(
  report: Report,
  key: str,
  name: str,
  options: dict[str, Any],
  image_size: int,
  prompts: Sequence[Prompt],
) -> None:
  """Checks one reward whose files are there."""
  if name in device_rewards.NAMES:
    report.attempt(_device_reward, key, name, options)
  elif (local := _backend(name, options)) is not None:
    rule = {k: v for k, v in options.items() if k in _RULE}
    report.attempt(_judged_unloaded, key, name, *local, rule)
  else:
    try_reward(report, key, name, options, prompts, image_size)


def _paths(report: Report, key: str, name: str, options: Mapping[str, Any]) -> dict[str, str]:
  """The options that name files, as paths on this machine; each missing one is a problem."""
  paths = {}
  for option in PATHS:
    value = options.get(option)
    if isinstance(value, str):
      path = report.attempt(_option_path, key, name, option, options)
      paths[option] = str(path or value)
  return paths


def _option_path(key: str, name: str, option: str, options: Mapping[str, Any]) -> Path:
  """Where the file or folder that an option of a reward names lies on this machine."""
  value, of = options[option], option_kind(name, option, options)
  return (
    existing(f"{key}.{option}", value, of) if of else there(f"{key}.{option}", value, Path(value))
  )


def _scorable(
  report: Report, config: Any, section: str, name: str, prompts: Prompts
) -> list[Prompt]:
  """The first prompt to train on and the first held-out one that a reward can score, if any.

  Says how many it cannot. Stage 1 does not score what it trains on.
  """
  options, chosen = lookup(config, section)[name], []
  if section == "rewards" and config.stage == "stage2" and prompts.train:
    said = report.attempt(
      check_training_prompts, {name: options}, prompts.train, config.data.prompts
    )
    if said:
      report.warning(said)
    chosen += report.attempt(_first, name, options, prompts.train) or []
  if held_out := prompts.held_out[f"{section}.{name}"]:
    path = held_out_path(config, section, name, options)
    prompts_found = report.attempt(_first, name, options, held_out) or []
    if said := report.attempt(shortage, section, name, held_out, path, options):
      say = report.warning if prompts_found else report.problem
      say(f"{said} Name other held-out prompts for it in {section}.{name}.held_out.")
    chosen += prompts_found
  return chosen


def _first(name: str, options: Mapping[str, Any], prompts: Sequence[Prompt]) -> list[Prompt]:
  """The first prompt that the reward can score, if any."""
  lacking = set(unscorable(name, prompts, options))
  return [p for i, p in enumerate(prompts) if i not in lacking][:1]


def _device_reward(key: str, name: str, options: Mapping[str, Any]) -> None:
  """Loads a reward of the device without the values of its weights."""
  device_rewards.checked_options(name, options)
  try:
    with headers_only():
      device_rewards.load(name, options)
  except UserError as error:
    raise UserError(f"{key}: {error}") from error


def _backend(name: str, options: Mapping[str, Any]) -> tuple[type, dict[str, Any]] | None:
  """The class and the options of what PyTorch would run on this machine; None of other rewards."""
  rest = dict(options)
  rest.pop("max_failed", None)
  if "url" in rest:
    return None
  if name == "hpsv3" and "directory" in rest:
    return HPSv3, rest
  if name == "geneval" and rest.get("detector") == "mask2former":
    del rest["detector"]
    return Mask2FormerDetector, rest
  if name == "geneval2" and "directory" in rest:
    return Qwen3VLAnswerer, {k: v for k, v in rest.items() if k not in _RULE}
  return None


def _judged_unloaded(
  key: str, name: str, build: type, options: dict[str, Any], rule: Mapping[str, Any]
) -> None:
  """Checks what PyTorch is to load, which takes too long to try; `rule` has GenEval2's options."""
  if build is Qwen3VLAnswerer:
    GenEval2(lambda images, queries: [], **rule)
  try:
    bound = inspect.signature(build).bind(**options)
  except TypeError as error:
    raise UserError(f"{key}: {error} in its options {options!r}.") from error
  bound.apply_defaults()
  if build is HPSv3:
    file = Path(options["directory"]) / "HPSv3.safetensors"
    if not file.is_file():
      raise UserError(f"{key}: {file} does not exist; download MizzenAI/HPSv3.")
    if importlib.util.find_spec("hpsv3") is None:
      raise UserError(
        f"{key} needs the package hpsv3; install it where the reward is served, as docs/rewards.md"
        " says, and give that service's url."
      )
  else:
    for option in ("directory", "clip"):
      if option in options:
        _huggingface(key, option, Path(options[option]))
  torch, wanted = require_torch(name), str(bound.arguments["device"])
  try:
    kind = torch.device(wanted).type
  except RuntimeError as error:
    raise UserError(f"{key}.device is {wanted!r}: {str(error).splitlines()[0]}") from error
  if kind == "cuda" and not torch.cuda.is_available():
    raise UserError(
      f"{key}.device is {wanted!r}, which PyTorch does not have here; give another device, or let"
      " another machine serve the reward and give its url."
    )


def _huggingface(key: str, option: str, directory: Path) -> None:
  """Checks that a folder looks like a model of transformers."""
  if not (directory / "config.json").is_file():
    raise UserError(f"{key}.{option} is {directory}, which holds no config.json.")
  if not any(file for kind in ("safetensors", "bin") for file in directory.glob(f"*.{kind}")):
    raise UserError(f"{key}.{option} is {directory}, which holds no weights.")
