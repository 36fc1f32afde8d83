"""The common part of scores by CLIP features of image and prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.clip import CLIP
from rtdmd_jax.models.clip_config import TextConfig, VisionConfig
from rtdmd_jax.models.tokenizer import load_tokenizer, tokenize
from rtdmd_jax.rewards.device.description import Loadable, ReadFrom
from rtdmd_jax.rewards.device.preprocess import ClipTransform

Transform = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True, eq=False)
class ClipReward(Loadable):
  """A CLIP model as a reward; its methods are pure in their array arguments.

  The score is the cosine of both features; subclasses may scale it.

  Attributes:
    module: both encoders.
    transform: from images in [0, 1] to the image encoder's input, for scores.
    gradient_transform: the same for back-propagation; the same object, except where published code
      does otherwise and that was asked for.
    tokenize: from prompts to ids [B, L].
    params: the loaded parameters, to be passed to the methods (and perhaps sharded before).
  """

  module: CLIP
  transform: Transform
  gradient_transform: Transform
  tokenize: Callable[[Sequence[str]], np.ndarray]
  params: Any

  @property
  def text_length(self) -> int:
    """The number of ids per prompt."""
    return self.module.config.text.max_position_embeddings

  def text_features(self, params: Any, ids: jax.Array) -> jax.Array:
    """Maps token ids [B, L] to float32 features [B, P] of length 1."""
    return unit(self.module.apply({"params": params}, ids, method=CLIP.text_features))

  def image_features(self, params: Any, images: jax.Array) -> jax.Array:
    """Maps images [B, H, W, 3] in [0, 1] to float32 features [B, P] of length 1."""
    return self._image_features(params, self.transform(images))

  def score(self, params: Any, images: jax.Array, text_features: jax.Array) -> jax.Array:
    """Scores each image with its own prompt.

    Args:
      params: parameters of both encoders.
      images: [B, H, W, 3] in [0, 1], any size.
      text_features: [B, P] from `text_features`.

    Returns:
      [B] float32.
    """
    return self._compare(params, self.image_features(params, images), text_features)

  def gradient_score(self, params: Any, images: jax.Array, text_features: jax.Array) -> jax.Array:
    """`score` with the preprocessing that is back-propagated through."""
    features = self._image_features(params, self.gradient_transform(images))
    return self._compare(params, features, text_features)

  def from_cosine(self, params: Any, cosine: jax.Array) -> jax.Array:
    """The score [B] for cosines [B]."""
    del params
    return cosine

  def _image_features(self, params: Any, pixels: jax.Array) -> jax.Array:
    return unit(self.module.apply({"params": params}, pixels, method=CLIP.image_features))

  def _compare(self, params: Any, image: jax.Array, text: jax.Array) -> jax.Array:
    if text.shape != image.shape:
      raise ValueError(f"text features are {text.shape}, expected {image.shape}")
    return self.from_cosine(params, jnp.sum(image * text, axis=-1))


def unit(x: jax.Array) -> jax.Array:
  """Float32 vectors [B, P] of length 1."""
  x = x.astype(jnp.float32)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def processor_words(directory: Any, text: TextConfig) -> Callable[[Sequence[str]], np.ndarray]:
  """The tokenizer in a processor's directory, for a text encoder: prompts to ids [B, L]."""
  return partial(
    tokenize,
    load_tokenizer(Path(directory)),
    length=text.max_position_embeddings,
    vocabulary=text.vocab_size,
  )


def read_transform(
  read: ReadFrom, directory: Any, vision: VisionConfig, **changes: str
) -> ClipTransform:
  """The transform that preprocessor_config.json describes, for an image encoder.

  Args:
    read: reads it.
    directory: holds the file.
    vision: the encoder, whose image size must be the file's.
    **changes: fields of `ClipTransform` that the file does not decide; `method` must be given.

  Raises:
    UserError: a missing or broken file, or another size.
  """
  config = read(directory, "preprocessor_config.json")
  transform = ClipTransform.from_dict(config, method=changes["method"])
  if transform.crop != vision.image_size:
    raise UserError(
      f"crop_size in {directory}/preprocessor_config.json is {transform.crop}, but image_size in"
      f" config.json is {vision.image_size}."
    )
  return replace(transform, **changes)


def processor_transforms(
  read: ReadFrom, directory: Any, vision: VisionConfig, *, compat: bool
) -> tuple[ClipTransform, ClipTransform]:
  """Transforms for scores and for gradients of rewards that use CLIP's own image processor.

  Both are the same antialiased cubic resize and crop. With `compat`, scores are Pillow's on 8-bit
  images, to the rounding, and gradients go through a bilinear resize, as in RTDMD's released code.
  """
  own = read_transform(read, directory, vision, method="bicubic", margin="down")
  if not compat:
    return own, own
  return replace(own, rounding="pillow"), replace(own, method="bilinear", margin="even")
