"""Rewards on the host in a run of several processes: each image is scored by one of them."""

from collections.abc import Sequence

import jax
import numpy as np

from rtdmd_jax import hosts
from rtdmd_jax.prompts import Prompt
from rtdmd_jax.rewards.multi import MultiReward
from rtdmd_jax.sharding import held_rows, split_batch


def score_held(
  rewards: MultiReward, images: jax.Array, prompts: Sequence[Prompt]
) -> dict[str, np.ndarray]:
  """Every reward [N] of a global array of images [N, H, W, 3]; each process scores what it holds.

  All must call it, and all get all scores. The share of failures that `max_failed` allows is of a
  process's own images.

  Raises:
    UserError: in all processes, where one of them cannot score.
  """
  return _score(rewards, *held_rows(split_batch(images)), prompts)


def score_shared(
  rewards: MultiReward, images: np.ndarray, prompts: Sequence[Prompt]
) -> dict[str, np.ndarray]:
  """As `score_held`, of images that all processes have; they take turns."""
  rows = np.arange(jax.process_index(), len(images), jax.process_count())
  return _score(rewards, rows, images[rows], prompts)


def _score(
  rewards: MultiReward, rows: np.ndarray, images: np.ndarray, prompts: Sequence[Prompt]
) -> dict[str, np.ndarray]:
  own: dict[str, list[float]] = {}
  with hosts.together():
    if len(rows):
      mine = [prompts[i] for i in rows]
      scores = rewards(images, [p.text for p in mine], [p.record for p in mine])
      own = {name: scores[name].tolist() for name in rewards.weights}
  result = {name: np.full(len(prompts), np.nan, np.float32) for name in rewards.weights}
  for indices, scores in hosts.gather([rows.tolist(), own]):
    for name, values in scores.items():
      result[name][indices] = values
  return result
