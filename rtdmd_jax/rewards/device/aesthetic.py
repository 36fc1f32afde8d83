"""The LAION aesthetic predictor: an affine map of CLIP ViT-L/14's image features."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.models import score_head
from rtdmd_jax.models.clip import CLIPVision
from rtdmd_jax.models.encoders import clip_vision_network
from rtdmd_jax.models.network import param_shapes
from rtdmd_jax.models.score_head import ScoreHead
from rtdmd_jax.rewards.device.clip_reward import Transform, processor_transforms, unit
from rtdmd_jax.rewards.device.description import Loadable, ReadFrom, RewardDescription
from rtdmd_jax.weights.safetensors import params_from_tensors
from rtdmd_jax.weights.state_dict import read_state_dict


@dataclass(frozen=True, eq=False)
class Aesthetic(Loadable):
  """How much people would like the picture, about 4 to 7; the prompt does not matter.

  Attributes:
    module: the image encoder.
    transform, gradient_transform: see `ClipReward`.
    params: `{"clip": ..., "head": ...}`.
    text_length: the number of ids per prompt.
  """

  PUBLISHED = MappingProxyType({"directory": "openai/clip-vit-large-patch14"})
  text_length = 0

  module: CLIPVision
  transform: Transform
  gradient_transform: Transform
  params: Any

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
    """Describes `sac+logos+ava1-l14-linearMSE.pth` and its image encoder.

    Args:
      read: reads config files.
      weights: the published head.
      directory: `openai/clip-vit-large-patch14`, or an image encoder of it alone, with
        preprocessor_config.json.
      dtype: type of the encoder's computation and parameters; resizing and head are float32.
      compat: scores are Pillow's on 8-bit images, as in RTDMD's released code, which does not
        back-propagate this reward: gradients then go through the antialiased cubic resize.

    Raises:
      UserError: missing or broken files, or files that do not fit together.
    """
    network = clip_vision_network(read(directory, "config.json"), dtype=dtype)
    module = network.module
    own, _ = processor_transforms(read, directory, module.config, compat=False)
    transform, _ = processor_transforms(read, directory, module.config, compat=compat)
    features = jnp.zeros((1, module.config.projection_dim))
    shapes = {
      "clip": network.shapes,
      "head": param_shapes(ScoreHead(), jnp.float32, features),
    }

    def load() -> "Aesthetic":
      tensors, table = read_state_dict(weights), score_head.TABLE
      head = params_from_tensors(tensors, shapes["head"], table, source=weights)
      return cls(module, transform, own, {"clip": network.load(directory), "head": head})

    return RewardDescription(cls(module, transform, own, shapes), load)

  def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
    """Nothing, [B, 0]."""
    return np.zeros((len(prompts), 0), np.int32)

  def text_features(self, params: Any, ids: jax.Array) -> jax.Array:
    """Nothing, [B, 0]."""
    del params
    return ids

  def score(self, params: Any, images: jax.Array, text_features: jax.Array) -> jax.Array:
    """Scores [B] float32 of images [B, H, W, 3] in [0, 1]; `text_features` [B, 0] is not read."""
    del text_features
    return self._score(params, self.transform(images))

  def gradient_score(self, params: Any, images: jax.Array, text_features: jax.Array) -> jax.Array:
    """`score` with the preprocessing that is back-propagated through."""
    del text_features
    return self._score(params, self.gradient_transform(images))

  def _score(self, params: Any, pixels: jax.Array) -> jax.Array:
    features = unit(self.module.apply({"params": params["clip"]}, pixels))
    return ScoreHead().apply({"params": params["head"]}, features)
