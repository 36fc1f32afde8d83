"""Prompts to device batches."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rtdmd_jax.datasets.prompts import Prompt, prompt_batch
from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.pipeline.prompt_cache import PromptCache
from rtdmd_jax.runtime.sharding import replicate
from rtdmd_jax.training.state import Batch

Tree = Any


def encoding_bytes(batch: Batch) -> int:
  """Bytes of one prompt's encoding, as `PromptCache` keeps it, by the shapes of a batch alone."""
  leaves = jax.tree.leaves((batch.conditioning, batch.reward_text))
  return sum(math.prod(a.shape[1:]) * np.dtype(a.dtype).itemsize for a in leaves)


def make_batch(
  prompts: Sequence[Prompt],
  cache: PromptCache,
  unconditional: Conditioning,
  *,
  seed: int,
  step: int,
  prompts_per_batch: int,
  images_per_prompt: int,
) -> tuple[Batch, list[Prompt]]:
  """Global batch number `step`, on the device, and the prompt of each sample."""
  chosen, samples = prompt_batch(seed, step, len(prompts), prompts_per_batch, images_per_prompt)
  distinct = chosen[::images_per_prompt]
  encoded = cache([prompts[i].text for i in distinct])
  index = np.repeat(np.arange(prompts_per_batch, dtype=np.int32), images_per_prompt)
  batch = Batch(
    encoded["conditioning"], index, samples, unconditional, encoded.get("reward_text", {})
  )
  return replicate(batch), [prompts[i] for i in chosen]
