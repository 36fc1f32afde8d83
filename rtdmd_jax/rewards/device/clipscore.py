"""CLIPScore: the cosine between an image and its prompt (arXiv 2104.08718), differentiable."""

import os
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp

from rtdmd_jax.models.encoders import clip_network
from rtdmd_jax.models.tokenizer import no_tokenizer
from rtdmd_jax.rewards.device.clip_reward import ClipReward, processor_words, read_transform
from rtdmd_jax.rewards.device.description import ReadFrom, RewardDescription


class ClipScore(ClipReward):
  """The plain cosine, without the factor 2.5 and the clipping at 0 of the paper.

  This is what text-to-image work reports, about 0.2 to 0.35 for ViT-L/14.
  """

  PUBLISHED = MappingProxyType({"directory": "openai/clip-vit-large-patch14"})

  @classmethod
  def describe(
    cls,
    read: ReadFrom,
    directory: str | os.PathLike,
    dtype: Any = jnp.float32,
    *,
    method: str = "bilinear",
    compat: bool = False,
  ) -> RewardDescription:
    """Describes a `CLIPModel` directory with its tokenizer and preprocessor files.

    Args:
      read: reads config files.
      directory: holds config.json, the weights, tokenizer files and preprocessor_config.json.
      dtype: type of the encoders' computation and parameters; resizing and cosines are float32.
      method: "bilinear", as RTDMD's CLIPScore resizes, or "bicubic", as CLIP itself does.
      compat: scores are of images rounded to 8 bits, as in RTDMD's released code.

    Raises:
      UserError: missing or broken files, or files that do not fit together.
    """
    network = clip_network(read(directory, "config.json"), dtype=dtype)
    module = network.module
    own = read_transform(read, directory, module.config.vision, method=method)
    transform = replace(own, rounding="bytes") if compat else own

    def load() -> "ClipScore":
      words = processor_words(directory, module.config.text)
      return cls(module, transform, own, words, network.load(directory))

    return RewardDescription(cls(module, transform, own, no_tokenizer, network.shapes), load)
