"""A trial of a reward on the host: it is built, and called once on a grey image."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from rtdmd_jax.aot.check.report import Report
from rtdmd_jax.datasets.prompts import Prompt
from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards import multi
from rtdmd_jax.rewards.isolated import MEAN, sentence

# Of a service, which is asked once.
_ASK = {"attempts": 1, "timeout": 20.0}
_GREY = 128
_PROTOCOL = (
  "a reward is called with (images uint8 [B, H, W, 3], B prompts, B records) and returns one number"
  " an image, [B]"
)


def try_reward(
  report: Report,
  key: str,
  name: str,
  options: Mapping[str, Any],
  prompts: Sequence[Prompt],
  image_size: int,
) -> None:
  """Builds a reward and scores two grey images with it; whatever goes wrong is a problem.

  Args:
    report: of the check.
    key: of the reward's section.
    name: of the reward, or its import path.
    options: its own options.
    prompts: at most two that it should be able to score; without any it is only built.
    image_size: side of the images in pixels.
  """
  asked = dict(options)
  if ":" not in name and ("url" in options or "openai_url" in options):
    asked |= _ASK
  elif name == "ocr":
    asked = {"workers": 1} | asked
  with _said() as said:
    reward = _built(report, key, name, asked)
    if reward is None or not prompts:
      return
    # Two, so that a number for all images is not taken for one an image.
    chosen = [prompts[0], prompts[-1]]
    images = np.full((2, image_size, image_size, 3), _GREY, np.uint8)
    try:
      result = reward(images, [p.text for p in chosen], [p.record for p in chosen])
    except UserError as error:
      report.problem(f"{key}: {error}")
    except (Exception, SystemExit) as error:  # code of others may do anything
      report.problem(
        f"{key} fails on a grey image with the prompt {chosen[0].text!r}: {sentence(error)};"
        f" {_PROTOCOL}."
      )
    else:
      # A service keeps the reason of its last NaN, others write it into the log.
      reasons = [*said, getattr(reward, "last_failure", "")]
      _judge(report, key, name, result, [reason for reason in reasons if reason])


def _built(report: Report, key: str, name: str, options: Mapping[str, Any]) -> Any:
  """The reward; None if it cannot be built."""
  try:
    return multi.make({name: 1.0}, options={name: options}).rewards[name]
  except UserError as error:
    report.problem(f"{key}: {error}")
  except (Exception, SystemExit) as error:
    report.problem(f"{key} cannot be built: {sentence(error)}.")
  return None


def _judge(report: Report, key: str, name: str, result: object, said: Sequence[str]) -> None:
  """Whether what a reward returned for two images is scores."""
  outputs = dict(result) if isinstance(result, Mapping) else {name: result}
  if name not in outputs:
    report.problem(f"{key} returns {sorted(map(str, outputs))}, without its own name {name!r}.")
    return
  if MEAN in outputs:
    report.problem(f"{key} returns an output {MEAN!r}, which is the weighted sum's name.")
  for output, values in outputs.items():
    of = "" if output == name else f" as {output!r}"
    try:
      scores = np.asarray(values, np.float32)
    except (TypeError, ValueError):
      report.problem(f"{key} returns {_shown(values)}{of}, not numbers; {_PROTOCOL}.")
      continue
    if values is None or scores.shape != (2,):
      shape = "" if values is None else f" of shape {list(scores.shape)}"
      report.problem(f"{key} returns {_shown(values)}{shape}{of} for 2 images; {_PROTOCOL}.")
    elif output == name and not np.isfinite(scores).all():
      _not_finite(report, key, scores, said)


def _not_finite(report: Report, key: str, scores: np.ndarray, said: Sequence[str]) -> None:
  if said:
    report.problem(f"{key} cannot score a grey image: {said[-1]}.")
  else:
    value = float(scores[~np.isfinite(scores)][0])
    report.warning(f"{key} gives {value} for a grey image; such samples count as failed.")


def _shown(value: object) -> str:
  text = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
  return text if len(text) <= 60 else f"{text[:60]}..."


@contextmanager
def _said() -> Iterator[list[str]]:
  """Collects the log of the rewards inside, which is kept from the terminal."""
  said: list[str] = []
  handler = logging.Handler()
  handler.emit = lambda record: said.append(record.getMessage())
  logger = logging.getLogger("rtdmd_jax.rewards")
  propagated = logger.propagate
  logger.addHandler(handler)
  logger.propagate = False
  try:
    yield said
  finally:
    logger.propagate = propagated
    logger.removeHandler(handler)
