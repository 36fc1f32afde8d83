"""Rewards on the host in a run of several processes: each image is scored by one of them."""

from collections.abc import Collection, Sequence

import jax
import numpy as np

from rtdmd_jax.datasets.prompts import Prompt
from rtdmd_jax.rewards.isolated import Scores
from rtdmd_jax.rewards.multi import MultiReward
from rtdmd_jax.runtime import multihost
from rtdmd_jax.runtime.sharding import local_rows, split_batch


def score_local_rows(
  rewards: MultiReward, images: jax.Array, prompts: Sequence[Prompt]
) -> dict[str, np.ndarray]:
  """Every reward [N] of a global array of images [N, H, W, 3]; each process scores what it holds.

  All must call it, and all get all scores. The share of failures that `max_failed` allows is of a
  process's own images.

  Raises:
    UserError: in all processes, where one of them cannot score.
  """
  rows, held = local_rows(split_batch(images))
  own: dict[str, np.ndarray] = {}
  with multihost.raise_on_all_processes():
    if len(rows):
      mine = [prompts[i] for i in rows]
      own = rewards(held, [p.text for p in mine], [p.record for p in mine])
  return _gathered(rows, Scores(own, {}), rewards.weights, len(prompts)).values


def score_shared(
  rewards: MultiReward, images: np.ndarray, prompts: Sequence[Prompt], names: Collection[str]
) -> Scores:
  """Rewards [N] of images [N, H, W, 3] that all processes have, for an evaluation; they take turns.

  All must call it, and all get all scores of `names`. No reward's failure ends it, in whichever
  process: it costs that process's images their scores.
  """
  rows = np.arange(jax.process_index(), len(images), jax.process_count())
  mine = [prompts[i] for i in rows]
  texts, records = [p.text for p in mine], [p.record for p in mine]
  own = rewards.isolated(images[rows], texts, records, names=names)
  return _gathered(rows, own, names, len(prompts))


def _gathered(rows: np.ndarray, own: Scores, names: Collection[str], count: int) -> Scores:
  """The scores [count] of `names` from every process, each of its own rows."""
  result = Scores({name: np.full(count, np.nan, np.float32) for name in names}, {})
  values = {name: own.values[name].tolist() for name in names if len(rows)}
  for number, (indices, scores, reasons) in enumerate(
    multihost.gather([rows.tolist(), values, own.reasons])
  ):
    for name, found in scores.items():
      result.values[name][indices] = found
    for name, reason in reasons.items():
      where = f"process {number}: " if jax.process_count() > 1 else ""
      result.reasons.setdefault(name, f"{where}{reason}")
  return result
