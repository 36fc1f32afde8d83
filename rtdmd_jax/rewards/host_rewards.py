"""Rewards that need pixels on the host: computed here, or by a service behind a `url`."""

import functools
import inspect
from collections.abc import Callable, Mapping

from rtdmd_jax.datasets.geneval_records import TAGS
from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.device_rewards import OptionError
from rtdmd_jax.rewards.host.geneval import GenEval
from rtdmd_jax.rewards.host.geneval2 import GenEval2
from rtdmd_jax.rewards.host.ocr import OCR
from rtdmd_jax.rewards.imports import imported
from rtdmd_jax.rewards.remote.reward import RemoteReward

_ACCURACIES = ("strict_accuracy", "accuracy")
_GENEVAL_METRICS = (*_ACCURACIES, *(f"{tag}_{name}" for tag in TAGS for name in _ACCURACIES))


def _bound(reward: str, function: Callable, options: Mapping) -> Callable:
  """`function` with its options; a wrong or missing one is an OptionError before it runs."""
  try:
    inspect.signature(function).bind(**options)
  except TypeError as error:
    raise OptionError(f"reward {reward!r}: {error} in its options {dict(options)!r}") from error
  return functools.partial(function, **options)


def _remote(name: str, options: Mapping, **defaults: object) -> RemoteReward:
  return _bound(name, functools.partial(RemoteReward, name), {**defaults, **options})()


def _one_of(name: str, options: Mapping, keys: tuple[str, ...]) -> str:
  """Which of `keys` says where the reward is computed."""
  given = [key for key in keys if key in options]
  if len(given) != 1:
    raise OptionError(
      f"reward {name!r} needs one of the options {', '.join(keys)}, got {dict(options)!r}"
    )
  return given[0]


def ocr(**options: object) -> OCR | RemoteReward:
  """Drawn text: read here (options of `OCR`), or at a service with `url`."""
  return _remote("ocr", options) if "url" in options else _bound("ocr", OCR, options)()


def hpsv3(**options: object) -> Callable:
  """HPSv3: at a service with `url`, or here with PyTorch from `directory`."""
  if _one_of("hpsv3", options, ("url", "directory")) == "url":
    return _remote("hpsv3", options)
  from rtdmd_jax.rewards.backends.hpsv3 import HPSv3

  return _bound("hpsv3", HPSv3, options)()


def geneval(**options: object) -> GenEval | RemoteReward:
  """GenEval: at a service with `url`, or here over a `detector`.

  The detector is "shapes", "mask2former" (with its options), or the import path of a detector or,
  with further options, of what makes one.
  """
  if _one_of("geneval", options, ("url", "detector")) == "url":
    return _remote("geneval", options, extra_metrics=_GENEVAL_METRICS)
  rest = {key: value for key, value in options.items() if key != "detector"}
  return GenEval(_detector(str(options["detector"]), rest))


def _detector(name: str, options: Mapping) -> Callable:
  if name == "mask2former":
    from rtdmd_jax.rewards.backends.mask2former import Mask2FormerDetector

    return _bound("geneval", Mask2FormerDetector, options)()
  if name == "shapes":
    from rtdmd_jax.rewards.host.shapes_detector import detect_shapes

    made = detect_shapes
  elif ":" in name:
    made = imported(name)
    if options:
      return _bound("geneval", made, options)()
  else:
    raise UserError(
      f"reward 'geneval': unknown detector {name!r}; use 'shapes', 'mask2former' or a path"
      " pkg.mod:name"
    )
  if options:
    raise OptionError(f"reward 'geneval': detector {name!r} has no options {sorted(options)}")
  return made


def geneval2(**options: object) -> GenEval2 | RemoteReward:
  """GenEval2: at a reward service with `url`, or its rule here over a model that answers.

  `openai_url` is an endpoint with log-probabilities, `directory` a Qwen3-VL to run with PyTorch,
  and `answerer` the import path of what makes an answerer. `aggregate` and `questions` belong to
  the rule, all other options to the answerer.
  """
  where = _one_of("geneval2", options, ("url", "openai_url", "directory", "answerer"))
  if where == "url":
    return _remote("geneval2", options)
  rule = {key: options[key] for key in ("aggregate", "questions") if key in options}
  rest = {key: value for key, value in options.items() if key not in rule}
  if where == "openai_url":
    from rtdmd_jax.rewards.host.openai_vqa import OpenAIAnswerer

    build, rest["url"] = OpenAIAnswerer, rest.pop("openai_url")
  elif where == "directory":
    from rtdmd_jax.rewards.backends.qwen3_vl import Qwen3VLAnswerer

    build = Qwen3VLAnswerer
  else:
    build = imported(str(rest.pop("answerer")))
  return GenEval2(_bound("geneval2", build, rest)(), **rule)


FACTORIES: dict[str, Callable] = {
  "ocr": ocr,
  "hpsv3": hpsv3,
  "geneval": geneval,
  "geneval2": geneval2,
}
