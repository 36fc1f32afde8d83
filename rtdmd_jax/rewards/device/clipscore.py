"""CLIPScore: the cosine between an image and its prompt (arXiv 2104.08718), differentiable."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from rtdmd_jax.models.encoders import load_clip
from rtdmd_jax.models.tokenizer import load_tokenizer, tokenize
from rtdmd_jax.rewards.device.clip_reward import ClipReward, read_transform


class ClipScore(ClipReward):
  """The plain cosine, without the factor 2.5 and the clipping at 0 of the paper.

  This is what text-to-image work reports, about 0.2 to 0.35 for ViT-L/14.
  """

  @classmethod
  def from_pretrained(
    cls,
    directory: str | os.PathLike,
    dtype: Any = jnp.float32,
    *,
    method: str = "bilinear",
    compat: bool = False,
  ) -> "ClipScore":
    """Loads a `CLIPModel` directory with its tokenizer and preprocessor files.

    Args:
      directory: holds config.json, the weights, tokenizer files and preprocessor_config.json.
      dtype: type of the encoders' computation and parameters; resizing and cosines are float32.
      method: "bilinear", as RTDMD's CLIPScore resizes, or "bicubic", as CLIP itself does.
      compat: scores are of images rounded to 8 bits, as in RTDMD's released code.

    Raises:
      UserError: missing or broken files, or files that do not fit together.
    """
    module, params = load_clip(directory, dtype=dtype)
    own = read_transform(directory, module.config.vision, method=method)
    transform = replace(own, rounding="bytes") if compat else own
    words = partial(
      tokenize,
      load_tokenizer(Path(directory)),
      length=module.config.text.max_position_embeddings,
      vocabulary=module.config.text.vocab_size,
    )
    return cls(module, transform, own, words, params)
