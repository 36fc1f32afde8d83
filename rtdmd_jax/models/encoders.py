"""Loading of the frozen encoders: autoencoder, CLIP and T5 directories to (module, params)."""

import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rtdmd_jax.errors import UserError
from rtdmd_jax.models import clip, t5, vae
from rtdmd_jax.models.clip_config import CLIPConfig, TextConfig
from rtdmd_jax.weights.maps import KeyTable
from rtdmd_jax.weights.safetensors import checkpoint_keys, load_params, read_config

# Whether the text encoder of this class has a projection.
_TEXT_CLASSES = {"CLIPTextModel": False, "CLIPTextModelWithProjection": True}


def load_vae(
  directory: str | os.PathLike, *, dtype: Any = jnp.float32
) -> tuple[vae.AutoencoderKL, Any]:
  """Loads diffusers' `vae/` directory.

  Args:
    directory: holds config.json and the safetensors weights.
    dtype: type of the computation and of the parameters.

  Raises:
    UserError: missing or broken files, a config that is not supported, or keys that do not fit.
  """
  module = vae.AutoencoderKL(vae.VAEConfig.from_dict(read_config(directory)), dtype)
  side = module.config.factor
  shapes = _abstract(module, jnp.zeros((1, side, side, module.config.in_channels)))
  return module, load_params(directory, shapes, vae.TABLE, dtype=dtype)


def load_clip_text(
  directory: str | os.PathLike, *, dtype: Any = jnp.float32
) -> tuple[clip.CLIPText, Any]:
  """Loads a directory of `CLIPTextModel` or `CLIPTextModelWithProjection`; see `load_vae`."""
  config = read_config(directory)
  name = (config.get("architectures") or [None])[0]
  if name not in _TEXT_CLASSES:
    raise UserError(
      f'"architectures" in {directory}/config.json is {config.get("architectures")},'
      f" expected one of {', '.join(_TEXT_CLASSES)}."
    )
  module = clip.CLIPText(TextConfig.from_dict(config), _TEXT_CLASSES[name], dtype)
  shapes = _abstract(module, jnp.zeros((1, 1), jnp.int32))
  table = clip_text_table(directory)
  return module, load_params(directory, shapes, table, dtype=dtype, ignore=clip.IGNORED_KEYS)


def clip_text_table(directory: str | os.PathLike) -> KeyTable:
  """The key table of a text encoder's directory: with the prefix `text_model` or without it."""
  prefixed = any(key.startswith("text_model.") for key in checkpoint_keys(directory))
  return clip.TABLE if prefixed else clip.BARE_TEXT_TABLE


def load_clip(directory: str | os.PathLike, *, dtype: Any = jnp.float32) -> tuple[clip.CLIP, Any]:
  """Loads a directory of `CLIPModel`, both encoders; see `load_vae`."""
  module = clip.CLIP(CLIPConfig.from_dict(read_config(directory)), dtype)
  side = module.config.vision.image_size
  pixels = jnp.zeros((1, side, side, module.config.vision.num_channels))
  shapes = _abstract(module, jnp.zeros((1, 1), jnp.int32), pixels)
  return module, load_params(directory, shapes, clip.TABLE, dtype=dtype, ignore=clip.IGNORED_KEYS)


def load_t5(directory: str | os.PathLike, *, dtype: Any = jnp.float32) -> tuple[t5.T5Encoder, Any]:
  """Loads a directory of `T5EncoderModel`, or the encoder of a full T5; see `load_vae`."""
  module = t5.T5Encoder(t5.T5Config.from_dict(read_config(directory)), dtype)
  shapes = _abstract(module, jnp.zeros((1, 1), jnp.int32))
  return module, load_params(directory, shapes, t5.TABLE, dtype=dtype, ignore=t5.IGNORED_KEYS)


def _abstract(module: nn.Module, *inputs: jax.Array) -> Any:
  return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
