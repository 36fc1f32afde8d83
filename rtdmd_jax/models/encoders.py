"""The frozen encoders of images and text: networks of config files, values of directories.

Every encoder has one function that describes it (`*_network`, given the contents of config.json)
and one that loads it (`load_*`, given its directory).
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from rtdmd_jax.errors import UserError
from rtdmd_jax.models import clip, qwen3, t5, vae, vae_flux2
from rtdmd_jax.models.clip_config import CLIPConfig, TextConfig, VisionConfig
from rtdmd_jax.models.network import Network, param_shapes
from rtdmd_jax.weights.key_table import KeyTable
from rtdmd_jax.weights.safetensors import checkpoint_keys, read_config

# Whether the text encoder of this class has a projection.
_TEXT_CLASSES = {"CLIPTextModel": False, "CLIPTextModelWithProjection": True}
_VAES = {
  vae.CLASS_NAME: (vae.VAEConfig, vae.AutoencoderKL),
  vae_flux2.CLASS_NAME: (vae_flux2.Flux2VAEConfig, vae_flux2.AutoencoderKLFlux2),
}


def vae_network(
  config: Mapping[str, Any], *, source: str | os.PathLike, dtype: Any = jnp.float32
) -> Network:
  """The autoencoder that diffusers' config.json describes.

  Args:
    config: contents of config.json.
    source: where it is from, for error messages.
    dtype: type of the computation and of the parameters.

  Raises:
    UserError: an unknown class name, or a config that is not supported.
  """
  name = config.get("_class_name")
  if not isinstance(name, str) or name not in _VAES:
    raise UserError(f"{source}: _class_name is {name!r}, expected one of {', '.join(_VAES)}.")
  config_class, module_class = _VAES[name]
  module = module_class(config_class.from_dict(config), dtype)
  side = module.config.factor
  shapes = param_shapes(module, dtype, jnp.zeros((1, side, side, module.config.in_channels)))
  ignore = vae_flux2.IGNORED_KEYS if name == vae_flux2.CLASS_NAME else ()
  return Network(module, shapes, module.table, ignore)


def load_vae(
  directory: str | os.PathLike, *, dtype: Any = jnp.float32
) -> tuple[vae.AutoencoderKL, Any]:
  """Loads diffusers' `vae/` directory.

  Args:
    directory: holds config.json and the safetensors weights.
    dtype: type of the computation and of the parameters.

  Returns:
    The module and its parameters.

  Raises:
    UserError: missing or broken files, a config that is not supported, or keys that do not fit.
  """
  return _loaded(vae_network(read_config(directory), source=directory, dtype=dtype), directory)


def clip_text_network(
  config: Mapping[str, Any], *, source: str | os.PathLike, dtype: Any = jnp.float32
) -> Network:
  """A `CLIPTextModel` or `CLIPTextModelWithProjection`; see `vae_network`."""
  try:
    projection = has_projection(config)
  except UserError as error:
    raise UserError(f"{source}/config.json: {error}") from error
  module = clip.CLIPText(TextConfig.from_dict(config), projection, dtype)
  return Network(module, param_shapes(module, dtype, _ids()), clip_text_table, clip.IGNORED_KEYS)


def load_clip_text(
  directory: str | os.PathLike, *, dtype: Any = jnp.float32
) -> tuple[clip.CLIPText, Any]:
  """Loads a directory of `CLIPTextModel` or `CLIPTextModelWithProjection`; see `load_vae`."""
  network = clip_text_network(read_config(directory), source=directory, dtype=dtype)
  return _loaded(network, directory)


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


def clip_network(config: Mapping[str, Any], *, dtype: Any = jnp.float32) -> Network:
  """A `CLIPModel`, both encoders; see `vae_network`."""
  module = clip.CLIP(CLIPConfig.from_dict(config), dtype)
  shapes = param_shapes(module, dtype, _ids(), _pixels(module.config.vision))
  return Network(module, shapes, clip.TABLE, clip.IGNORED_KEYS)


def load_clip(directory: str | os.PathLike, *, dtype: Any = jnp.float32) -> tuple[clip.CLIP, Any]:
  """Loads a directory of `CLIPModel`, both encoders; see `load_vae`."""
  return _loaded(clip_network(read_config(directory), dtype=dtype), directory)


def clip_vision_network(config: Mapping[str, Any], *, dtype: Any = jnp.float32) -> Network:
  """The image encoder of a `CLIPModel` or `CLIPVisionModelWithProjection`; see `vae_network`."""
  ignore = clip.IGNORED_KEYS
  if config.get("model_type") == "clip":
    both = CLIPConfig.from_dict(config)
    vision = replace(both.vision, projection_dim=both.projection_dim)
    ignore += (r"text_(model|projection)\..*", "logit_scale")
  else:
    vision = VisionConfig.from_dict(config)
  module = clip.CLIPVision(vision, dtype)
  return Network(module, param_shapes(module, dtype, _pixels(vision)), clip.TABLE, ignore)


def t5_network(config: Mapping[str, Any], *, dtype: Any = jnp.float32) -> Network:
  """A `T5EncoderModel`, or the encoder of a full T5; see `vae_network`."""
  module = t5.T5Encoder(t5.T5Config.from_dict(config), dtype)
  return Network(module, param_shapes(module, dtype, _ids()), t5.TABLE, t5.IGNORED_KEYS)


def load_t5(directory: str | os.PathLike, *, dtype: Any = jnp.float32) -> tuple[t5.T5Encoder, Any]:
  """Loads a directory of `T5EncoderModel`, or the encoder of a full T5; see `load_vae`."""
  return _loaded(t5_network(read_config(directory), dtype=dtype), directory)


def qwen3_network(
  config: Mapping[str, Any], *, layers: tuple[int, ...], dtype: Any = jnp.float32
) -> Network:
  """A `Qwen3ForCausalLM` up to the last of the hidden states asked for.

  Args:
    config: contents of config.json.
    layers: increasing numbers of hidden states, as transformers numbers them.
    dtype: type of the computation and of the parameters.

  Raises:
    UserError: a config that is not supported, or `layers` that the model does not have.
  """
  read = qwen3.Qwen3Config.from_dict(config)
  qwen3.check_layers(read, layers)
  module = qwen3.Qwen3(read, tuple(layers), dtype)
  shapes = param_shapes(module, dtype, _ids())
  return Network(module, shapes, qwen3.key_table(layers), qwen3.ignored_keys(read, layers))


def load_qwen3(
  directory: str | os.PathLike, *, layers: tuple[int, ...], dtype: Any = jnp.float32
) -> tuple[qwen3.Qwen3, Any]:
  """Loads a directory of `Qwen3ForCausalLM`; see `qwen3_network` and `load_vae`."""
  return _loaded(qwen3_network(read_config(directory), layers=layers, dtype=dtype), directory)


def _loaded(network: Network, directory: str | os.PathLike) -> tuple[Any, Any]:
  return network.module, network.load(directory)


def _ids() -> jax.Array:
  return jnp.zeros((1, 1), jnp.int32)


def _pixels(config: VisionConfig) -> jax.Array:
  return jnp.zeros((1, config.image_size, config.image_size, config.num_channels))
