"""Scores of a system on held-out prompts: means, intervals and comparisons."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rtdmd_jax.datasets.prompts import Prompt
from rtdmd_jax.rewards.isolated import Scores

Tree = Any


def prompt_means(values: np.ndarray, count: int) -> np.ndarray:
  """Mean score [P] of each of `count` prompts, NaN where no image of it has one.

  Args:
    values: [R * P], all prompts one after the other, R times; NaN where there is no score.
    count: P.
  """
  values = values.reshape(-1, count)
  known = np.isfinite(values)
  total = np.where(known, values, 0.0).sum(0)
  return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


class PromptScores(NamedTuple):
  """A system's scores on one set of prompts.

  Attributes:
    prompts: P.
    values: of each output [P], NaN where there is no score.
    failed: number of images without it.
    reasons: why the first of those is without it, if there are any.
  """

  prompts: Sequence[Prompt]
  values: dict[str, np.ndarray]
  failed: dict[str, int]
  reasons: Mapping[str, str]

  @classmethod
  def of(cls, scores: Scores, prompts: Sequence[Prompt]) -> "PromptScores":
    """Means over the images of all prompts, once or several times one after the other."""
    values = {name: prompt_means(v, len(prompts)) for name, v in scores.values.items()}
    return cls(prompts, values, {name: scores.failed(name) for name in values}, scores.reasons)


def table_row(system: Any, sets: Sequence[PromptScores]) -> dict:
  """A system's line of the table: name, steps, guidance, and each reward's mean, also by tag.

  Args:
    system: has `name`, `steps` and `guidance`.
    sets: what it scored.
  """
  scores, per_tag = {}, {}
  for part in sets:
    tags = np.array([(p.record or {}).get("tag", "") for p in part.prompts])
    for name, values in part.values.items():
      scores[name] = summary(values) | {"failed": part.failed[name]}
      if part.failed[name]:
        scores[name]["reason"] = part.reasons.get(name, "")
    for tag in filter(None, dict.fromkeys(tags)):
      own = {name: summary(values[tags == tag]) for name, values in part.values.items()}
      if own:
        per_tag.setdefault(str(tag), {}).update(own)
  return {
    "name": system.name,
    "steps": system.steps,
    "guidance": system.guidance,
    "scores": scores,
    "per_tag": per_tag,
  }


def _differences(result: Sequence[PromptScores], other: Sequence[PromptScores]) -> dict[str, dict]:
  return {
    name: summary(one.values[name] - two.values[name])
    for one, two in zip(result, other, strict=True)
    for name in one.values
  }


def summary(values: np.ndarray) -> dict:
  """Mean of the finite values, half width of its 95 % interval, and their number."""
  values = values[np.isfinite(values)].astype(np.float64)
  if not len(values):
    return {"mean": None, "ci95": None, "n": 0}
  ci = 1.96 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
  return {"mean": float(values.mean()), "ci95": ci, "n": len(values)}


def failure_texts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """A sentence for every score of the table's rows that images lack."""
  return [
    f"{row['name']}: reward {name} failed on {score['failed']:,} of its images: {score['reason']}"
    for row in rows
    for name, score in row["scores"].items()
    if score.get("failed") and score["reason"]
  ]
