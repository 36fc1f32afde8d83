"""ImageReward: BLIP reading the prompt before the image (arXiv 2304.05977), differentiable."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.blip import IGNORED_KEYS, TABLE, BlipVisionConfig, ImageRewardNet
from rtdmd_jax.models.med import MedConfig
from rtdmd_jax.models.network import param_shapes
from rtdmd_jax.rewards.device.clip_reward import Transform
from rtdmd_jax.rewards.device.description import Loadable, ReadFrom, RewardDescription
from rtdmd_jax.rewards.device.preprocess import (
  CLIP_MEAN,
  CLIP_STD,
  ClipTransform,
  StretchTransform,
)
from rtdmd_jax.weights.safetensors import params_from_tensors
from rtdmd_jax.weights.state_dict import read_state_dict

# Statistics of raw scores on ImageReward's validation images.
_MEAN = 0.16717362830052426
_STD = 1.0333394966054072
_LENGTH = 35
_PAD = 0
# Channels of an attention head of every ViT that BLIP was published with.
_HEAD = 64


@dataclass(frozen=True, eq=False)
class ImageReward(Loadable):
  """A standardised score, about -2.5 to 2; its methods are pure in their array arguments.

  The text encoder looks at the image, so prompts cannot be encoded ahead: their "features" are the
  token ids.

  Attributes:
    module: both encoders and the head.
    transform, gradient_transform: see `ClipReward`.
    tokenizer: BERT's, with BLIP's two extra tokens.
    params: the loaded parameters.
    text_length: the number of ids per prompt.
  """

  PUBLISHED = MappingProxyType({"weights": "zai-org/ImageReward/ImageReward.pt"})
  text_length = _LENGTH

  module: ImageRewardNet
  transform: Transform
  gradient_transform: Transform
  tokenizer: Any
  params: Any

  @classmethod
  def describe(
    cls,
    read: ReadFrom,
    weights: str | os.PathLike,
    tokenizer: str | os.PathLike,
    dtype: Any = jnp.float32,
    *,
    compat: bool = False,
  ) -> RewardDescription:
    """Describes `ImageReward.pt` of `THUDM/ImageReward`.

    The sizes of the image encoder are those of the tensors in the file; where it is missing, the
    published ones.

    Args:
      read: reads config files.
      weights: the published file, with med_config.json beside it.
      tokenizer: directory of `bert-base-uncased` (vocab.txt or tokenizer.json).
      dtype: type of the encoders' computation and parameters; resizing and head are float32.
      compat: scores are Pillow's on 8-bit images, to the rounding, and gradients go through a
        cubic resize without antialiasing straight to a square, as in RTDMD's released code.

    Raises:
      UserError: missing or broken files, or files that do not fit together.
    """
    text = MedConfig.from_dict(read(Path(weights).parent, "med_config.json"))
    vision = BlipVisionConfig()
    if Path(weights).is_file():
      vision = _vision_config(read_state_dict(weights), weights)
    module = ImageRewardNet(vision, text, dtype)
    ids, side = jnp.zeros((1, _LENGTH), jnp.int32), vision.image_size
    shapes = param_shapes(module, dtype, ids, ids > 0, jnp.zeros((1, side, side, 3)))
    own = gradient = ClipTransform(side, side, CLIP_MEAN, CLIP_STD, "bicubic")
    if compat:
      own, gradient = replace(own, rounding="pillow"), StretchTransform(side, CLIP_MEAN, CLIP_STD)

    def load() -> "ImageReward":
      words = load_bert_tokenizer(tokenizer)
      if len(words) > text.vocab_size:
        raise UserError(
          f"{tokenizer} has {len(words)} tokens with BLIP's, but vocab_size in med_config.json"
          f" beside {weights} is {text.vocab_size}; give bert-base-uncased."
        )
      tensors = read_state_dict(weights)
      params = params_from_tensors(tensors, shapes, TABLE, source=weights, ignore=IGNORED_KEYS)
      return cls(module, own, gradient, words, params)

    return RewardDescription(cls(module, own, gradient, None, shapes), load)

  def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
    """Maps prompts to ids [B, 35], padded with 0 and truncated."""
    rows = self.tokenizer(list(prompts), padding="max_length", max_length=_LENGTH, truncation=True)
    return np.array(rows.input_ids, np.int32)

  def text_features(self, params: Any, ids: jax.Array) -> jax.Array:
    """The ids themselves, [B, 35]."""
    del params
    return ids

  def score(self, params: Any, images: jax.Array, ids: jax.Array) -> jax.Array:
    """Scores each image with its own prompt.

    Args:
      params: all parameters.
      images: [B, H, W, 3] in [0, 1], any size.
      ids: [B, 35] from `text_features`.

    Returns:
      [B] float32.
    """
    return self._score(params, self.transform(images), ids)

  def gradient_score(self, params: Any, images: jax.Array, ids: jax.Array) -> jax.Array:
    """`score` with the preprocessing that is back-propagated through."""
    return self._score(params, self.gradient_transform(images), ids)

  def _score(self, params: Any, pixels: jax.Array, ids: jax.Array) -> jax.Array:
    if ids.shape[0] != pixels.shape[0]:
      raise ValueError(f"{ids.shape[0]} prompts for {pixels.shape[0]} images")
    raw = self.module.apply({"params": params}, ids, ids != _PAD, pixels)
    return (raw - _MEAN) / _STD


def _vision_config(
  tensors: Mapping[str, np.ndarray], source: str | os.PathLike
) -> BlipVisionConfig:
  """Sizes of the image encoder, which its tensors alone tell; heads have 64 channels as in ViT."""
  prefix = "blip.visual_encoder."
  try:
    width, _, patch, _ = tensors[f"{prefix}patch_embed.proj.weight"].shape
    positions = tensors[f"{prefix}pos_embed"].shape[1]
  except (KeyError, ValueError) as error:
    raise UserError(f"{source} has no image encoder of BLIP; give ImageReward.pt.") from error
  blocks = {key.split(".")[3] for key in tensors if key.startswith(f"{prefix}blocks.")}
  side = math.isqrt(positions - 1) * patch
  return BlipVisionConfig(width, len(blocks), max(1, width // _HEAD), side, patch)


def load_bert_tokenizer(directory: str | os.PathLike) -> Any:
  """BERT's tokenizer with the start and encoder tokens that BLIP adds at the end.

  Raises:
    UserError: no tokenizer's files there, or padding is not token 0.
  """
  from transformers import BertTokenizer

  # Without its files transformers would make a tokenizer that knows no word.
  if not any((Path(directory) / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
    raise UserError(f"{directory} holds no tokenizer.json or vocab.txt; give bert-base-uncased.")
  try:
    tokenizer = BertTokenizer.from_pretrained(str(directory), local_files_only=True)
  except (OSError, ValueError) as error:
    raise UserError(f"{directory} holds no usable BERT tokenizer ({error}).") from error
  tokenizer.add_special_tokens({"bos_token": "[DEC]"})
  tokenizer.add_tokens(["[ENC]"], special_tokens=True)
  if tokenizer.pad_token_id != _PAD:
    raise UserError(
      f"{directory} pads with {tokenizer.pad_token_id}, expected {_PAD} as BERT does."
    )
  return tokenizer
