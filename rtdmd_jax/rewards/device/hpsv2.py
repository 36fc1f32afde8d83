"""HPSv2: CLIP ViT-H/14 tuned on people's preferences (arXiv 2306.09341), differentiable."""

import html
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from rtdmd_jax.models.clip import TABLE
from rtdmd_jax.models.encoders import clip_network
from rtdmd_jax.models.tokenizer import checked_ids, load_tokenizer, no_tokenizer
from rtdmd_jax.rewards.device.clip_reward import ClipReward
from rtdmd_jax.rewards.device.description import ReadFrom, RewardDescription
from rtdmd_jax.rewards.device.preprocess import CLIP_MEAN, CLIP_STD, PadTransform
from rtdmd_jax.weights.open_clip import to_transformers
from rtdmd_jax.weights.safetensors import params_from_tensors
from rtdmd_jax.weights.state_dict import read_state_dict


class HPSv2(ClipReward):
  """The cosine, about 0.2 to 0.38 for v2.1; the temperature plays no part."""

  PUBLISHED = MappingProxyType({"directory": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"})

  @classmethod
  def describe(
    cls,
    read: ReadFrom,
    weights: str | os.PathLike,
    directory: str | os.PathLike,
    dtype: Any = jnp.float32,
    *,
    compat: bool = False,
  ) -> RewardDescription:
    """Describes `HPS_v2.1_compressed.pt`.

    Args:
      read: reads config files.
      weights: the published file, or any state dictionary of open_clip's CLIP.
      directory: the model it was tuned from, `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`: config.json
        and the tokenizer are read, its weights are not.
      dtype: type of the encoders' computation and parameters; resizing and cosines are float32.
      compat: scores are of images rounded to 8 bits, as in RTDMD's released code.

    Raises:
      UserError: missing or broken files, or files that do not fit together.
    """
    module, shapes, *_ = clip_network(read(directory, "config.json"), dtype=dtype)
    own = PadTransform(module.config.vision.image_size, CLIP_MEAN, CLIP_STD)
    transform = replace(own, rounding="bytes") if compat else own
    text = module.config.text

    def load() -> "HPSv2":
      tokenizer = load_tokenizer(Path(directory))
      tensors = to_transformers(read_state_dict(weights))
      params = params_from_tensors(tensors, shapes, TABLE, source=weights)
      words = partial(
        _tokenize, tokenizer, length=text.max_position_embeddings, vocabulary=text.vocab_size
      )
      return cls(module, transform, own, words, params)

    return RewardDescription(cls(module, transform, own, no_tokenizer, shapes), load)


def _tokenize(tokenizer: Any, prompts: Sequence[str], length: int, vocabulary: int) -> np.ndarray:
  """open_clip's ids [B, length]: HTML entities resolved, 0 after the end.

  open_clip also repairs broken encodings of text (ftfy), which is left to the prompts' author.
  """
  plain = [html.unescape(html.unescape(prompt)).strip() for prompt in prompts]
  rows = tokenizer(plain, padding="max_length", max_length=length, truncation=True)
  return checked_ids(tokenizer, np.where(rows.attention_mask, rows.input_ids, 0), vocabulary)
