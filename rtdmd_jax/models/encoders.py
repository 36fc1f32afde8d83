"""Loading of the frozen encoders of images and text: directories to (module, params)."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rtdmd_jax.errors import UserError
from rtdmd_jax.models import clip, qwen3, t5, vae, vae_flux2
from rtdmd_jax.models.clip_config import CLIPConfig, TextConfig, VisionConfig
from rtdmd_jax.weights.key_table import KeyTable
from rtdmd_jax.weights.safetensors import checkpoint_keys, load_params, read_config

# Whether the text encoder of this class has a projection.
_TEXT_CLASSES = {"CLIPTextModel": False, "CLIPTextModelWithProjection": True}
_VAES = {
  vae.CLASS_NAME: (vae.VAEConfig, vae.AutoencoderKL),
  vae_flux2.CLASS_NAME: (vae_flux2.Flux2VAEConfig, vae_flux2.AutoencoderKLFlux2),
}


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
  config = read_config(directory)
  module, shapes = abstract_vae(config, source=directory, dtype=dtype)
  ignore = vae_flux2.IGNORED_KEYS if config["_class_name"] == vae_flux2.CLASS_NAME else ()
  return module, load_params(directory, shapes, module.table, dtype=dtype, ignore=ignore)


def abstract_vae(
  config: Mapping[str, Any], *, source: str | os.PathLike, dtype: Any = jnp.float32
) -> tuple[vae.AutoencoderKL, Any]:
  """The autoencoder that a config.json describes, and its abstract parameters.

  Args:
    config: contents of config.json.
    source: where it is from, for error messages.
    dtype: type of the computation.

  Raises:
    UserError: an unknown class name, or a config that is not supported.
  """
  name = config.get("_class_name")
  if not isinstance(name, str) or name not in _VAES:
    raise UserError(f"{source}: _class_name is {name!r}, expected one of {', '.join(_VAES)}.")
  config_class, module_class = _VAES[name]
  module = module_class(config_class.from_dict(config), dtype)
  side = module.config.factor
  return module, _abstract(module, jnp.zeros((1, side, side, module.config.in_channels)))


def load_clip_text(
  directory: str | os.PathLike, *, dtype: Any = jnp.float32
) -> tuple[clip.CLIPText, Any]:
  """Loads a directory of `CLIPTextModel` or `CLIPTextModelWithProjection`; see `load_vae`."""
  config = read_config(directory)
  try:
    projection = has_projection(config)
  except UserError as error:
    raise UserError(f"{directory}/config.json: {error}") from error
  module = clip.CLIPText(TextConfig.from_dict(config), projection, dtype)
  shapes = _abstract(module, jnp.zeros((1, 1), jnp.int32))
  table = clip_text_table(directory)
  return module, load_params(directory, shapes, table, dtype=dtype, ignore=clip.IGNORED_KEYS)


def has_projection(config: Mapping[str, Any]) -> bool:
  """Whether a CLIP text encoder's config.json has a projection of the pooled state.

  Raises:
    UserError: another class.
  """
  classes = config.get("architectures")
  name = classes[0] if isinstance(classes, list) and classes else None
  if not isinstance(name, str) or name not in _TEXT_CLASSES:
    raise UserError(f'"architectures" is {classes}, expected one of {", ".join(_TEXT_CLASSES)}.')
  return _TEXT_CLASSES[name]


def clip_text_table(directory: str | os.PathLike) -> KeyTable:
  """The key table of a text encoder's directory: with the prefix `text_model` or without it."""
  prefixed = any(key.startswith("text_model.") for key in checkpoint_keys(directory))
  return clip.TABLE if prefixed else clip.BARE_TEXT_TABLE


def load_clip(directory: str | os.PathLike, *, dtype: Any = jnp.float32) -> tuple[clip.CLIP, Any]:
  """Loads a directory of `CLIPModel`, both encoders; see `load_vae`."""
  module, shapes = abstract_clip(directory, dtype=dtype)
  return module, load_params(directory, shapes, clip.TABLE, dtype=dtype, ignore=clip.IGNORED_KEYS)


def abstract_clip(
  directory: str | os.PathLike, *, dtype: Any = jnp.float32
) -> tuple[clip.CLIP, Any]:
  """The module that a `CLIPModel`'s config.json describes, and its abstract parameters.

  Args:
    directory: holds config.json.
    dtype: type of the computation.

  Raises:
    UserError: a missing file, or a config that is not supported.
  """
  module = clip.CLIP(CLIPConfig.from_dict(read_config(directory)), dtype)
  return module, _abstract(module, jnp.zeros((1, 1), jnp.int32), _pixels(module.config.vision))


def load_clip_vision(
  directory: str | os.PathLike, *, dtype: Any = jnp.float32
) -> tuple[clip.CLIPVision, Any]:
  """Loads the image encoder of a `CLIPModel` or `CLIPVisionModelWithProjection`; see `load_vae`."""
  config = read_config(directory)
  ignore = clip.IGNORED_KEYS
  if config.get("model_type") == "clip":
    both = CLIPConfig.from_dict(config)
    vision = replace(both.vision, projection_dim=both.projection_dim)
    ignore += (r"text_(model|projection)\..*", "logit_scale")
  else:
    vision = VisionConfig.from_dict(config)
  module = clip.CLIPVision(vision, dtype)
  shapes = _abstract(module, _pixels(vision))
  return module, load_params(directory, shapes, clip.TABLE, dtype=dtype, ignore=ignore)


def _pixels(config: VisionConfig) -> jax.Array:
  return jnp.zeros((1, config.image_size, config.image_size, config.num_channels))


def load_t5(directory: str | os.PathLike, *, dtype: Any = jnp.float32) -> tuple[t5.T5Encoder, Any]:
  """Loads a directory of `T5EncoderModel`, or the encoder of a full T5; see `load_vae`."""
  module = t5.T5Encoder(t5.T5Config.from_dict(read_config(directory)), dtype)
  shapes = _abstract(module, jnp.zeros((1, 1), jnp.int32))
  return module, load_params(directory, shapes, t5.TABLE, dtype=dtype, ignore=t5.IGNORED_KEYS)


def load_qwen3(
  directory: str | os.PathLike, *, layers: tuple[int, ...], dtype: Any = jnp.float32
) -> tuple[qwen3.Qwen3, Any]:
  """Loads a directory of `Qwen3ForCausalLM` up to the last of the hidden states asked for.

  Args:
    directory: holds config.json and the safetensors weights.
    layers: increasing numbers of hidden states, as transformers numbers them.
    dtype: type of the computation and of the parameters.

  Raises:
    UserError: see `load_vae`, or `layers` that the model does not have.
  """
  config = qwen3.Qwen3Config.from_dict(read_config(directory))
  qwen3.check_layers(config, layers)
  module = qwen3.Qwen3(config, tuple(layers), dtype)
  shapes = _abstract(module, jnp.zeros((1, 1), jnp.int32))
  ignore = qwen3.ignored_keys(config, layers)
  return module, load_params(directory, shapes, qwen3.key_table(layers), dtype=dtype, ignore=ignore)


def _abstract(module: nn.Module, *inputs: jax.Array) -> Any:
  return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
