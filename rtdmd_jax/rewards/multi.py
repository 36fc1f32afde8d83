"""Several rewards as one scorer, with their weighted sum.

A reward is a callable `(images, prompts, metadata) -> [B]`, or `-> {output: [B]}` with its own name
among the outputs. It gets uint8 images `[B, H, W, 3]`, as every score of RTDMD is taken on 8-bit
images, a list of prompts and a list of GenEval records or None. A sample it cannot score is NaN.
"""

import difflib
import functools
import inspect
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards import device_rewards, host_rewards
from rtdmd_jax.rewards.imports import imported
from rtdmd_jax.rewards.isolated import (
  MEAN,
  Reward,
  Scores,
  beside,
  left_out,
  score_isolated,
  sentence,
)
from rtdmd_jax.rewards.outputs import checked_outputs
from rtdmd_jax.rewards.process import contained, described, undisturbed

# Share of a batch that a reward may fail on before it ends a training run.
MAX_FAILED = 0.5
# Keys of a reward's section in a training configuration that are not options of the reward.
RUN_KEYS = ("weight", "backpropagate", "held_out")
_UNAVAILABLE = (UserError, ImportError, OSError, ValueError, RuntimeError)
_logger = logging.getLogger(__name__)
T = TypeVar("T")


def _on_device(name: str, **options: object) -> Reward:
  """A reward on the device; the options are those of its class's `from_pretrained`."""
  return device_rewards.host_reward(device_rewards.load(name, options))


_FACTORIES: dict[str, Callable[..., Reward]] = {
  **{name: functools.partial(_on_device, name) for name in device_rewards.NAMES},
  **host_rewards.FACTORIES,
}


def _check_known(name: str, where: str) -> None:
  if name in _FACTORIES or ":" in name:
    return
  close = difflib.get_close_matches(name, _FACTORIES, n=1)
  hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(_FACTORIES)}"
  raise UserError(f"{where}: unknown reward {name!r}; {hint} (or an import path pkg.mod:Name)")


def _check_weight(name: str, weight: object) -> float:
  if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
    raise UserError(f"reward {name!r}: the weight must be a finite number, got {weight!r}")
  return float(weight)


def _check_share(name: str, share: object) -> float:
  if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
    raise device_rewards.OptionError(f"reward {name!r}: max_failed must be in 0..1, got {share!r}")
  return float(share)


def _build(name: str, options: Mapping) -> Reward:
  """Builds one reward; a wrong option is a UserError, a missing file whatever the reward raises."""
  if name in _FACTORIES:
    factory = _FACTORIES[name]
  else:
    with undisturbed():
      factory = imported(name)
  try:
    inspect.signature(factory).bind(**options)
  except TypeError as error:
    raise device_rewards.OptionError(
      f"reward {name!r}: {error} in its options {dict(options)!r}"
    ) from error
  if ":" not in name:
    return factory(**options)
  with undisturbed():
    try:
      reward = factory(**options)
    except _UNAVAILABLE:
      raise
    except (Exception, SystemExit) as error:
      raise UserError(described(error)) from error
  if not callable(reward):
    raise UserError(
      f"{name} returns {type(reward).__name__}, not a function of images, prompts and records"
    )
  return reward


class MultiReward:
  """Scores images with every reward; made by `make`.

  Attributes:
    rewards: the rewards in use, by name.
    weights: weight of each reward in use.
    unavailable: why each skipped reward could not be built, by name.
  """

  def __init__(
    self,
    rewards: Mapping[str, Reward],
    weights: Mapping[str, float],
    unavailable: Mapping[str, str],
    max_failed: Mapping[str, float],
    *,
    isolate_failures: bool,
  ):
    self.rewards = dict(rewards)
    self._isolate_failures = isolate_failures
    self._max_failed = dict(max_failed)
    self.weights = dict(weights)
    self.unavailable = dict(unavailable)

  def __call__(
    self, images: object, prompts: Sequence[str], metadata: Sequence[Mapping] | None = None
  ) -> dict[str, np.ndarray]:
    """Scores a batch.

    Args:
      images: `[B, H, W, 3]`, uint8 or floating point in [0, 1] (rounded to 8 bits, as published).
      prompts: the prompt of each image.
      metadata: the GenEval record of each image, for the rewards that need one.

    Returns:
      For each reward its scores `[B]` float32, the further outputs of a reward under their own
      names, and "mean": the weighted sum (not divided by anything; the published name). A sample
      with a pixel that is not finite, or that a reward failed on, is NaN there and in "mean".
      Rewards run side by side, each in one thread.

    Raises:
      UserError: a reward's input is missing, such as records for geneval, or, in training, a reward
        with a weight failed on a larger share of the samples than its `max_failed`, or any raised
        an error or returned what no scores are.
      ValueError: shapes or lengths do not fit.
    """
    images, usable = _as_uint8(images)
    _check_lengths(images, prompts, metadata)
    if self._isolate_failures:
      found = self._isolated(self.rewards, images, usable, prompts, metadata)
      for name, reason in found.reasons.items():
        self._warn(name, found.failed(name), len(images), reason)
      scores = found.values
    else:
      scores = self._strict(images, usable, prompts, metadata)
    total = sum(self.weights[n] * scores[n] for n in self.rewards if self.weights[n])
    scores[MEAN] = np.broadcast_to(np.asarray(total, np.float32), usable.shape).copy()
    return scores

  @property
  def names(self) -> list[str]:
    """The rewards in use and, after them, those that could not be built."""
    return [*self.rewards, *self.unavailable]

  def isolated(
    self,
    images: object,
    prompts: Sequence[str],
    metadata: Sequence[Mapping] | None = None,
    *,
    names: Collection[str] | None = None,
  ) -> Scores:
    """Scores a batch for an evaluation: no reward ends it, `max_failed` or not.

    Args:
      images: as in a call.
      prompts: as in a call.
      metadata: as in a call.
      names: the rewards to score by; all by default, those that could not be built among them.

    Returns:
      The outputs of each reward, NaN where it failed, and the reasons of failures.

    Raises:
      ValueError: shapes or lengths do not fit.
    """
    images, usable = _as_uint8(images)
    _check_lengths(images, prompts, metadata)
    names = self.names if names is None else names
    chosen = {name: self.rewards[name] for name in names if name in self.rewards}
    scores = self._isolated(chosen, images, usable, prompts, metadata)
    without = {name: self.unavailable[name] for name in names if name not in chosen}
    return beside([scores, left_out(len(images), without)])

  def _isolated(self, rewards, images, usable, prompts, metadata) -> Scores:
    scores = score_isolated(rewards, images, prompts, metadata)
    return scores.where(usable, "the image has pixels that are not finite")

  def _strict(self, images, usable, prompts, metadata) -> dict[str, np.ndarray]:
    """The outputs of all rewards; a failure beyond `max_failed` ends a training run."""
    scores: dict[str, np.ndarray] = {}

    def outputs(name: str) -> dict[str, np.ndarray]:
      try:
        result = contained(self.rewards[name], images, prompts, metadata)
      except UserError:
        raise
      except Exception as error:
        raise UserError(f"reward {name!r} failed: {described(error)}") from error
      try:
        return checked_outputs(name, result, len(images))
      except ValueError as error:
        raise UserError(str(error)) from error

    with undisturbed(), ThreadPoolExecutor(len(self.rewards)) as pool:
      pending = [pool.submit(outputs, name) for name in self.rewards]
    for name, future in zip(self.rewards, pending, strict=True):
      for output, values in future.result().items():
        if output in scores or output == MEAN:
          raise UserError(
            f"reward {name!r} returns an output {output!r}, which is another reward's or the sum's"
            " name; rename it"
          )
        scores[output] = np.where(usable, values, np.float32(np.nan))
      self._check_failures(name, scores[name][usable])
    return scores

  def _check_failures(self, name: str, scores: np.ndarray) -> None:
    """Ends a training run when too few of the scores [N] exist; a warning otherwise."""
    failed = int(np.sum(~np.isfinite(scores)))
    if not failed:
      return
    share = self._max_failed[name]
    if self.weights[name] and failed > share * len(scores):
      raise UserError(
        f"reward {name!r} failed on {failed} of {len(scores)} samples, more than its max_failed of"
        f" {share:g} allows; see the warnings above, repair it and start again"
      )
    self._warn(name, failed, len(scores))

  def _warn(self, name: str, failed: int, count: int, reason: str = "") -> None:
    because = f": {reason}" if reason else ""
    _logger.warning("reward %s failed on %d of %d samples%s", name, failed, count, because)


def _check_lengths(images: np.ndarray, prompts: Sequence, metadata: Sequence | None) -> None:
  if len(images) != len(prompts) or (metadata is not None and len(metadata) != len(images)):
    records = "no" if metadata is None else len(metadata)
    raise ValueError(f"{len(images)} images, {len(prompts)} prompts, {records} records")


def _as_uint8(images: object) -> tuple[np.ndarray, np.ndarray]:
  """8-bit images, and which of them had finite pixels only, `[B]` bool."""
  images = np.asarray(images)
  if images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(f"images must be [B, H, W, 3], got {images.shape}")
  if images.dtype == np.uint8:
    return images, np.ones(len(images), bool)
  if np.issubdtype(images.dtype, np.integer) or images.dtype == bool:
    raise ValueError(f"images must be uint8 or floating point in [0, 1], got {images.dtype}")
  images = images.astype(np.float32)
  usable = np.isfinite(images).all(axis=(1, 2, 3))
  images = np.where(usable[:, None, None, None], images, 0.0)
  return np.rint(np.clip(images, 0.0, 1.0) * 255).astype(np.uint8), usable


def make(
  names_and_weights: Mapping[str, float],
  *,
  options: Mapping[str, Mapping] | None = None,
  allow_unavailable: bool = False,
) -> MultiReward:
  """Builds the scorer of `names_and_weights`.

  Args:
    names_and_weights: weight of each reward: one of `device_rewards` or `host_rewards`, or
      the import path `pkg.mod:Name` of a callable that takes its options and returns a reward.
    options: keyword options of each reward, such as `{"geneval": {"detector": "shapes"}}`; entries
      for known rewards that are not asked for are ignored. Every reward also takes `max_failed`, in
      0..1: a training run ends when a larger share of a batch fails.
    allow_unavailable: for evaluation: a reward that cannot be built is left out with a warning and
      listed in `.unavailable`, and one that fails on a batch scores NaN there. Without it, for
      training, either ends the run.

  Raises:
    UserError: an unknown reward or option, a weight that is no finite number, a reward that cannot
      be built, or none left.
  """
  scorer = _make(names_and_weights, options or {}, allow_unavailable)
  if not scorer.rewards:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in scorer.unavailable.items())
    raise UserError(f"no reward is left to score with ({reasons or 'none is configured'})")
  return scorer


def make_for_evaluation(options: Mapping[str, Mapping]) -> MultiReward:
  """`make` with `allow_unavailable` of rewards with these options; also if none of them is left.

  Raises:
    UserError: an unknown reward or option.
  """
  return _make(dict.fromkeys(options, 1.0), options, True)


def _make(
  names_and_weights: Mapping[str, float], options: Mapping[str, Mapping], allow_unavailable: bool
) -> MultiReward:
  for name in names_and_weights:
    _check_known(name, "rewards")
  for name in options:
    _check_known(name, "reward options")
  weights = {name: _check_weight(name, weight) for name, weight in names_and_weights.items()}
  own = {name: dict(options.get(name, {})) for name in weights}
  max_failed = {n: _check_share(n, own[n].pop("max_failed", MAX_FAILED)) for n in weights}
  builders = {name: functools.partial(_build, name, own[name]) for name in weights}
  rewards, unavailable = build_available(builders, allow_unavailable=allow_unavailable)
  active = {name: weights[name] for name in rewards}
  return MultiReward(rewards, active, unavailable, max_failed, isolate_failures=allow_unavailable)


def build_available(
  builders: Mapping[str, Callable[[], T]], *, allow_unavailable: bool
) -> tuple[dict[str, T], dict[str, str]]:
  """The results of `builders` by name, and for each that fails the reason.

  Raises:
    UserError: a wrong option, or, without `allow_unavailable`, a reward that cannot be built.
  """
  made, unavailable = {}, {}
  kinds = Exception if allow_unavailable else _UNAVAILABLE
  for name, build in builders.items():
    try:
      made[name] = build()
    except device_rewards.OptionError:
      raise
    except kinds as error:
      reason = sentence(error)
      if not allow_unavailable:
        raise UserError(f"reward {name!r} cannot be built: {reason}") from error
      _logger.warning("reward %s is left out: %s", name, reason)
      unavailable[name] = reason
  return made, unavailable
