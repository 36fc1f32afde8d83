"""CLIPScore: the cosine between an image and its prompt (arXiv 2104.08718), differentiable."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.clip import CLIP
from rtdmd_jax.models.encoders import load_clip
from rtdmd_jax.models.text import load_tokenizer, tokenize
from rtdmd_jax.rewards.preprocess import ClipTransform
from rtdmd_jax.weights.safetensors import read_config


@dataclass(frozen=True, eq=False)
class ClipScore:
  """A CLIP model as a reward; its methods are pure in their array arguments.

  The score is the plain cosine, without the factor 2.5 and the clipping at 0 of the paper: what
  text-to-image work reports, about 0.2 to 0.35 for ViT-L/14.

  Attributes:
    module: both encoders.
    transform: from images in [0, 1] to the image encoder's input.
    tokenize: from prompts to ids [B, L].
    params: the loaded parameters, to be passed to the methods (and perhaps sharded before).
  """

  module: CLIP
  transform: ClipTransform
  tokenize: Callable[[Sequence[str]], np.ndarray]
  params: Any

  @classmethod
  def from_pretrained(
    cls, directory: str | os.PathLike, dtype: Any = jnp.float32, *, method: str = "bilinear"
  ) -> "ClipScore":
    """Loads a `CLIPModel` directory with its tokenizer and preprocessor files.

    Args:
      directory: holds config.json, the weights, tokenizer files and preprocessor_config.json.
      dtype: type of the encoders' computation and parameters; resizing and cosines are float32.
      method: "bilinear", as RTDMD's CLIPScore resizes, or "bicubic", as CLIP itself does.

    Raises:
      UserError: missing or broken files, or files that do not fit together.
    """
    transform = ClipTransform.from_dict(
      read_config(directory, "preprocessor_config.json"), method=method
    )
    module, params = load_clip(directory, dtype=dtype)
    if transform.crop != module.config.vision.image_size:
      raise UserError(
        f"crop_size in {directory}/preprocessor_config.json is {transform.crop}, but image_size in"
        f" config.json is {module.config.vision.image_size}."
      )
    length = module.config.text.max_position_embeddings
    tokenizer = load_tokenizer(Path(directory))
    return cls(module, transform, partial(tokenize, tokenizer, length=length), params)

  def text_features(self, params: Any, ids: jax.Array) -> jax.Array:
    """Maps token ids [B, L] to float32 features [B, P] of length 1."""
    return _unit(self.module.apply({"params": params}, ids, method=CLIP.text_features))

  def image_features(self, params: Any, images: jax.Array) -> jax.Array:
    """Maps images [B, H, W, 3] in [0, 1] to float32 features [B, P] of length 1."""
    pixels = self.transform(images)
    return _unit(self.module.apply({"params": params}, pixels, method=CLIP.image_features))

  def score(self, params: Any, images: jax.Array, text_features: jax.Array) -> jax.Array:
    """Cosine of each image with its own text.

    Args:
      params: parameters of both encoders.
      images: [B, H, W, 3] in [0, 1], any size.
      text_features: [B, P] from `text_features`.

    Returns:
      [B] float32.
    """
    features = self.image_features(params, images)
    if text_features.shape != features.shape:
      raise ValueError(f"text features are {text_features.shape}, expected {features.shape}")
    return jnp.sum(features * text_features, axis=-1)


def _unit(x: jax.Array) -> jax.Array:
  x = x.astype(jnp.float32)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
