"""Prompts to device batches: every distinct prompt is encoded once."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rtdmd_jax.prompts import Prompt, prompt_batch
from rtdmd_jax.sharding import fetch, replicate
from rtdmd_jax.stage1 import Batch
from rtdmd_jax.state import Conditioning

Tree = Any


class PromptCache:
  """Encodings of prompts, kept on the host so that the encoders run once a prompt.

  `encode` maps a list of `chunk` prompts to a tree of arrays [chunk, ...].
  """

  def __init__(self, encode: Callable[[list[str]], Tree], *, chunk: int = 64):
    self._encode, self._chunk = encode, chunk
    self._rows: dict[str, Tree] = {}

  def __call__(self, prompts: Sequence[str]) -> Tree:
    """The encodings [P, ...] of P prompts, as numpy arrays."""
    new = [p for p in dict.fromkeys(prompts) if p not in self._rows]
    for start in range(0, len(new), self._chunk):
      part = new[start : start + self._chunk]
      # A constant size, so that the encoders are compiled once.
      padded = part + [part[-1]] * (self._chunk - len(part))
      tree = fetch(self._encode(padded))
      for i, prompt in enumerate(part):
        self._rows[prompt] = jax.tree.map(lambda a, i=i: a[i], tree)
    return jax.tree.map(lambda *rows: np.stack(rows), *(self._rows[p] for p in prompts))


def make_batch(
  prompts: Sequence[Prompt],
  cache: PromptCache,
  unconditional: Conditioning,
  *,
  seed: int,
  step: int,
  prompts_per_batch: int,
  repeats: int,
) -> tuple[Batch, list[Prompt]]:
  """Global batch number `step`, on the device, and the prompt of each sample."""
  chosen, samples = prompt_batch(seed, step, len(prompts), prompts_per_batch, repeats)
  distinct = chosen[::repeats]
  encoded = cache([prompts[i].text for i in distinct])
  index = np.repeat(np.arange(prompts_per_batch, dtype=np.int32), repeats)
  batch = Batch(
    encoded["conditioning"], index, samples, unconditional, encoded.get("reward_text", {})
  )
  return replicate(batch), [prompts[i] for i in chosen]
