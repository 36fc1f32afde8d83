"""Rewards: their options and files, and what they make of a grey image."""

import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rtdmd_jax.check.files import Prompts, existing
from rtdmd_jax.check.report import Report
from rtdmd_jax.check.trial import try_reward
from rtdmd_jax.errors import UserError
from rtdmd_jax.prompts import Prompt
from rtdmd_jax.rewards import device
from rtdmd_jax.rewards.backends.hpsv3 import HPSv3
from rtdmd_jax.rewards.backends.mask2former import Mask2FormerDetector
from rtdmd_jax.rewards.backends.pytorch import require_torch
from rtdmd_jax.rewards.backends.qwen3_vl import Qwen3VLAnswerer
from rtdmd_jax.rewards.geneval2 import GenEval2
from rtdmd_jax.rewards.multi import MAX_FAILED
from rtdmd_jax.rewards.needs import Lack, unscorable
from rtdmd_jax.weights.headers import headers_only

# Keys of a reward's section that are not options of the reward itself.
_OF_THE_RUN = ("weight", "backpropagate", "held_out")
# Options of GenEval2's rule, beside those of the model that answers.
_RULE = ("aggregate", "questions")
# Options of the built-in rewards that name files or directories.
_PATHS = ("directory", "weights", "tokenizer", "processor", "clip", "questions")


def check_rewards(report: Report, config: Any, prompts: Prompts) -> None:
  """Checks every reward, trained or only evaluated, by itself and against its prompts."""
  for prefix, section in (("rewards", config.rewards), ("eval.rewards", config.eval.rewards)):
    for name, options in section.items():
      if prefix == "eval.rewards" and name in config.rewards:
        report.problem(f"eval.rewards.{name} is in rewards, too, and is evaluated as it is.")
        continue
      key = f"{prefix}.{name}"
      if options.get("backpropagate", False) and name not in device.NAMES:
        report.problem(
          f"{key}.backpropagate is true, but only {', '.join(device.NAMES)} have gradients."
        )
      own = {k: v for k, v in options.to_dict().items() if k not in _OF_THE_RUN}
      training = prompts.train if prefix == "rewards" else []
      _reward(report, key, name, own, config.model.image_size, training, prompts)


def _reward(
  report: Report,
  key: str,
  name: str,
  options: dict[str, Any],
  image_size: int,
  training: Sequence[Prompt],
  prompts: Prompts,
) -> None:
  known, before = ":" not in name, len(report.problems)
  if known:
    options |= _paths(report, key, options)
  if len(report.problems) > before:  # nothing can be built of missing files
    return
  held_out = prompts.held_out[key]
  usable = [
    *_scorable(report, key, name, options, training, "training", prompts.places["train"]),
    *_scorable(report, key, name, options, held_out, "held-out", prompts.places[key]),
  ]
  if name in device.NAMES:
    report.attempt(_device_reward, key, name, options)
  elif (local := _backend(name, options)) is not None:
    rule = {k: v for k, v in options.items() if k in _RULE}
    report.attempt(_judged_unloaded, key, name, *local, rule)
  else:
    try_reward(report, key, name, options, usable, image_size)


def _paths(report: Report, key: str, options: Mapping[str, Any]) -> dict[str, str]:
  """The options that name files, as paths on this machine; each missing one is a problem."""
  found = {}
  for option in _PATHS:
    value = options.get(option)
    if isinstance(value, str):
      path = report.attempt(existing, f"{key}.{option}", value)
      found[option] = value if path is None else str(path)
  return found


def _scorable(
  report: Report,
  key: str,
  name: str,
  options: Mapping[str, Any],
  prompts: Sequence[Prompt],
  kind: str,
  place: str,
) -> list[Prompt]:
  """The first prompt that the reward can score, if any; says how many it cannot."""
  lacks = report.attempt(unscorable, name, options, prompts)
  if lacks is None or not prompts:
    return []
  if lacks:
    _say(report, key, name, options, lacks, prompts, kind, place)
  missing = {lack.index for lack in lacks}
  return [p for i, p in enumerate(prompts) if i not in missing][:1]


def _say(
  report: Report,
  key: str,
  name: str,
  options: Mapping[str, Any],
  lacks: Sequence[Lack],
  prompts: Sequence[Prompt],
  kind: str,
  place: str,
) -> None:
  first, count = lacks[0], len(prompts)
  sentence = (
    f"{key} cannot score {len(lacks):,} of {count:,} {kind} prompts ({place}); the first is"
    f" {prompts[first.index].text!r}: {first.reason}."
  )
  # A reading of words leaves such samples out; the other rewards refuse the whole batch.
  share = options.get("max_failed", MAX_FAILED)
  if name == "ocr" and isinstance(share, int | float) and len(lacks) <= share * count:
    report.warning(sentence)
  elif kind == "held-out":
    report.problem(f"{sentence} Name a set that it can score in {key}.held_out.")
  else:
    report.problem(f"{sentence} Give prompts that it can score, or remove the reward.")


def _device_reward(key: str, name: str, options: Mapping[str, Any]) -> None:
  """Loads a reward of the device without the values of its weights."""
  build = device.bind(name, options)
  try:
    with headers_only():
      build()
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
