"""PickScore: CLIP ViT-H/14 tuned on people's choices (arXiv 2305.01569), differentiable."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rtdmd_jax.models.encoders import load_clip
from rtdmd_jax.models.tokenizer import load_tokenizer, tokenize
from rtdmd_jax.rewards.device.clip_reward import ClipReward, processor_transforms

# Brings the scaled cosine near 1, as Flow-GRPO and RTDMD train on; published tables leave it out.
_SCALE = 26.0


class PickScore(ClipReward):
  """`exp(logit_scale) * cosine / 26`, about 0.75 to 0.95."""

  @classmethod
  def from_pretrained(
    cls,
    directory: str | os.PathLike,
    dtype: Any = jnp.float32,
    *,
    processor: str | os.PathLike | None = None,
    compat: bool = False,
  ) -> "PickScore":
    """Loads `yuvalkirstain/PickScore_v1`.

    Args:
      directory: holds config.json and the safetensors weights.
      dtype: type of the encoders' computation and parameters; resizing and cosines are float32.
      processor: holds the tokenizer and preprocessor_config.json, published as
        `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`; None looks in `directory`.
      compat: the released code's preprocessing, see `processor_transforms`.

    Raises:
      UserError: missing or broken files, or files that do not fit together.
    """
    files = Path(directory if processor is None else processor)
    module, params = load_clip(directory, dtype=dtype)
    transforms = processor_transforms(files, module.config.vision, compat=compat)
    words = partial(
      tokenize,
      load_tokenizer(files),
      length=module.config.text.max_position_embeddings,
      vocabulary=module.config.text.vocab_size,
    )
    return cls(module, *transforms, words, params)

  def from_cosine(self, params: Any, cosine: jax.Array) -> jax.Array:
    """See the class."""
    return jnp.exp(params["logit_scale"].astype(jnp.float32)) * cosine / _SCALE
