"""Watches what is not trained, and warns when it suffers while trained rewards rise."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.evaluate.image_statistics import diversity, image_statistics
from rtdmd_jax.evaluate.scores import summary

# Prompts and images of each for `images/diversity`; four more images per prompt say little more.
DIVERSE_PROMPTS, DIVERSE_IMAGES = 4, 4
# Which way is worse: 1 where a rise is a bad sign.
_WORSE = {
  "images/dark_share": 1,
  "images/saturation": 1,
  "images/colour_entropy": -1,
  "images/diversity": -1,
}
Means = dict[str, tuple[float, float]]  # name -> (mean, half width of its 95 % interval)


class Monitor:
  """Compares every evaluation of a run with its first, which a resumed run finds in `file`.

  Values are those of `eval/<reward>` for every reward, trained or only watched, and of
  `image_values`.
  """

  def __init__(self, file: Path, trained: Sequence[str]):
    """`trained` are the rewards of the objective; all others are watched."""
    self._file, self._trained = file, [f"eval/{name}" for name in trained]

  def look(self, step: int, values: Mapping[str, np.ndarray]) -> str | None:
    """Takes the values of an evaluation by name; a sentence if they are suspicious.

    Raises:
      UserError: the file is broken.
    """
    now = {name: _mean(v) for name, v in values.items()}
    if not self._file.exists():
      self._file.write_text(json.dumps({"step": step, "means": now}))
      return None
    try:
      first = json.loads(self._file.read_text())
      before = {name: (float(mean), float(width)) for name, (mean, width) in first["means"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(
        f"{self._file} is not what an evaluation left there ({error!r}); remove it, and the next"
        " one counts as the first"
      ) from error
    good, bad = moves(before, now, self._trained)
    if not good or not bad:
      return None
    return (
      f"step {step}: reward hacking? Since step {first['step']} {_changes(good, before, now)}, but"
      f" {_changes(bad, before, now)}; look at the previews (docs/troubleshooting.md)"
    )


def image_values(images: np.ndarray, groups: np.ndarray) -> dict[str, np.ndarray]:
  """The watched statistics of images, by the names of their metrics.

  Args:
    images: uint8 [P, H, W, 3], one a prompt.
    groups: uint8 [prompts, images, H, W, 3], several of each prompt.
  """
  prompts = np.repeat(np.arange(len(groups)), groups.shape[1])
  spread = diversity(groups.reshape(-1, *groups.shape[2:]), prompts)
  values = image_statistics(images) | {"diversity": np.array(list(spread.values()))}
  return {f"images/{name}": v for name, v in values.items()}


def moves(first: Means, now: Means, trained: Sequence[str]) -> tuple[list[str], list[str]]:
  """Trained rewards that rose, and other values that became worse.

  A value moved when its mean changed by more than the root of the summed squares of both half
  widths. Names missing from either evaluation are not compared.
  """

  def moved(name: str) -> int:
    (before, width), (after, new_width) = first[name], now[name]
    change = after - before
    return int(np.sign(change)) if abs(change) > math.hypot(width, new_width) else 0

  both = [name for name in now if name in first]
  good = [name for name in both if name in trained and moved(name) > 0]
  worse = {name: _WORSE.get(name, -1) for name in both if name not in trained}
  return good, [name for name, sign in worse.items() if moved(name) == sign]


def _mean(values: np.ndarray) -> tuple[float, float]:
  """The mean of the finite values and the half width of its interval, infinite where unknown."""
  of_values = summary(np.asarray(values))
  mean, width = of_values["mean"], of_values["ci95"]
  return math.nan if mean is None else mean, math.inf if width is None else float(width)


def _changes(names: Sequence[str], first: Means, now: Means) -> str:
  parts = []
  for name in names:
    verb = "rose" if now[name][0] > first[name][0] else "fell"
    parts.append(f"{name} {verb} from {first[name][0]:.3g} to {now[name][0]:.3g}")
  return " and ".join(parts)
