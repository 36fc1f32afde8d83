"""PickScore: CLIP ViT-H/14 tuned on people's choices (arXiv 2305.01569), differentiable."""

import os
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from rtdmd_jax.models.encoders import clip_network
from rtdmd_jax.models.tokenizer import no_tokenizer
from rtdmd_jax.rewards.device.clip_reward import ClipReward, processor_transforms, processor_words
from rtdmd_jax.rewards.device.description import ReadFrom, RewardDescription

# Brings the scaled cosine near 1, as Flow-GRPO and RTDMD train on; published tables leave it out.
_SCALE = 26.0


class PickScore(ClipReward):
  """`exp(logit_scale) * cosine / 26`, about 0.75 to 0.95."""

  PUBLISHED = MappingProxyType(
    {
      "directory": "yuvalkirstain/PickScore_v1",
      "processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    }
  )

  @classmethod
  def describe(
    cls,
    read: ReadFrom,
    directory: str | os.PathLike,
    dtype: Any = jnp.float32,
    *,
    processor: str | os.PathLike | None = None,
    compat: bool = False,
  ) -> RewardDescription:
    """Describes `yuvalkirstain/PickScore_v1`.

    Args:
      read: reads config files.
      directory: holds config.json and the safetensors weights.
      dtype: type of the encoders' computation and parameters; resizing and cosines are float32.
      processor: holds the tokenizer and preprocessor_config.json, published as
        `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`; None looks in `directory`.
      compat: the released code's preprocessing, see `processor_transforms`.

    Raises:
      UserError: missing or broken files, or files that do not fit together.
    """
    files = directory if processor is None else processor
    network = clip_network(read(directory, "config.json"), dtype=dtype)
    module = network.module
    transforms = processor_transforms(read, files, module.config.vision, compat=compat)

    def load() -> "PickScore":
      words = processor_words(files, module.config.text)
      return cls(module, *transforms, words, network.load(directory))

    return RewardDescription(cls(module, *transforms, no_tokenizer, network.shapes), load)

  def from_cosine(self, params: Any, cosine: jax.Array) -> jax.Array:
    """See the class."""
    return jnp.exp(params["logit_scale"].astype(jnp.float32)) * cosine / _SCALE
