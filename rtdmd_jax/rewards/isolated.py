"""Scores of an evaluation: whatever a reward does costs its own scores alone, and is named."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.outputs import checked_outputs
from rtdmd_jax.rewards.process import contained, undisturbed

MEAN = "mean"  # the weighted sum, an output of no reward
# Images of a call: a call that fails costs no more than these their scores.
_CALL = 256
_LONGEST = 300
_SILENT = "it gave no score and no reason"

Reward = Callable[[np.ndarray, Sequence[str], Sequence[Mapping] | None], object]


class Scores(NamedTuple):
  """The outputs of rewards for N images.

  Attributes:
    values: of each output [N] float32, NaN where there is no score; a reward's name is one of them.
    reasons: by output, why the first of the scores that it lacks is missing; for a reward's own
      name at least.
  """

  values: dict[str, np.ndarray]
  reasons: dict[str, str]

  def failed(self, name: str) -> int:
    """How many images lack the output `name`."""
    return int(np.isnan(self.values[name]).sum())

  def where(self, usable: np.ndarray, reason: str) -> "Scores":
    """The same, but NaN for `reason` where `usable` [N] is false."""
    if usable.all():
      return self
    values = {name: np.where(usable, v, np.float32(np.nan)) for name, v in self.values.items()}
    return Scores(values, dict.fromkeys(self.values, reason) | self.reasons)


def missing(count: int, reasons: Mapping[str, str]) -> Scores:
  """The scores [count] of rewards that have none, each for its reason."""
  return Scores({name: np.full(count, np.nan, np.float32) for name in reasons}, dict(reasons))


def left_out(count: int, unavailable: Mapping[str, str]) -> Scores:
  """The scores [count] of rewards that could not be built, for the reasons given."""
  return missing(count, {n: f"left out since the start: {r}" for n, r in unavailable.items()})


def beside(parts: Iterable[Scores]) -> Scores:
  """Scores by several rewards of the same images."""
  result = Scores({}, {})
  for part in parts:
    result.values.update(part.values)
    result.reasons.update(part.reasons)
  return result


def joined(parts: Sequence[Scores]) -> Scores:
  """Scores of several groups of images, one after the other; NaN for outputs that a group lacks."""
  counts = [len(next(iter(part.values.values()), ())) for part in parts]
  names = dict.fromkeys(name for part in parts for name in part.values)
  values = {
    name: np.concatenate(
      [
        part.values.get(name, np.full(count, np.nan, np.float32))
        for part, count in zip(parts, counts, strict=True)
      ]
    )
    for name in names
  }
  return Scores(values, {n: r for part in reversed(parts) for n, r in part.reasons.items()})


def attempt(name: str, call: Callable[[], object], count: int, silent: str = _SILENT) -> Scores:
  """The checked outputs [count] of what `call` returns; NaN where it fails, however it does.

  Args:
    name: of the reward.
    call: computes its result.
    count: number of images.
    silent: the reason of scores that are not finite.

  Raises:
    UserError: as `call` does; it may be about one of the images alone.
  """
  try:
    outputs = checked_outputs(name, call(), count)
  except UserError:
    raise
  except (Exception, SystemExit) as error:  # code of others may do anything
    return missing(count, {name: sentence(error)})
  outputs = {k: np.where(np.isfinite(v), v, np.float32(np.nan)) for k, v in outputs.items()}
  scores = Scores(outputs, {})
  return Scores(outputs, {name: silent} if scores.failed(name) else {})


def score_isolated(
  rewards: Mapping[str, Reward],
  images: np.ndarray,
  prompts: Sequence[str],
  records: Sequence[Mapping] | None,
) -> Scores:
  """Scores uint8 images [N, H, W, 3] by every reward, side by side; raises for no reward's mistake.

  Args:
    rewards: by name.
    images: [N, H, W, 3] uint8.
    prompts: N.
    records: N, or None.
  """

  def score(name: str) -> Scores:
    starts = range(0, max(len(images), 1), _CALL)
    parts = (slice(start, start + _CALL) for start in starts)
    return joined([_call(name, rewards[name], *_rows(part)) for part in parts])

  def _rows(part: slice) -> tuple:
    return images[part], prompts[part], None if records is None else records[part]

  taken, parts = {MEAN, *rewards}, []
  with undisturbed(), ThreadPoolExecutor(max(len(rewards), 1)) as pool:
    for name, scores in zip(rewards, pool.map(score, rewards), strict=True):
      others = scores.values.keys() - {name}
      if again := sorted(others & taken):
        reason = f"it returns {again[0]!r}, which is taken by another reward"
        scores = missing(len(images), {name: reason})
      else:
        taken |= others
      parts.append(scores)
  return beside(parts)


def _call(
  name: str,
  reward: Reward,
  images: np.ndarray,
  prompts: Sequence[str],
  records: Sequence[Mapping] | None,
) -> Scores:
  """One call of a reward; one an image where it refuses the whole."""
  try:
    scores = attempt(name, lambda: contained(reward, images, prompts, records), len(images))
  except UserError as error:
    if len(images) == 1:
      return missing(1, {name: sentence(error)})
    # One bad record must not cost the others their scores.
    each = range(len(images))
    own = [None if records is None else records[i : i + 1] for i in each]
    return joined(
      [_call(name, reward, images[i : i + 1], prompts[i : i + 1], own[i]) for i in each]
    )
  if scores.reasons.get(name) == _SILENT:
    # A reward may keep the reason of its last NaN, as `RemoteReward` does.
    return scores._replace(reasons={name: getattr(reward, "last_failure", "") or _SILENT})
  return scores


def sentence(error: BaseException) -> str:
  """An error as part of a sentence: on one line, and with its type if it is not ours."""
  text = " ".join(str(error).split())
  return text if isinstance(error, UserError) else f"{type(error).__name__}: {text[:_LONGEST]}"
