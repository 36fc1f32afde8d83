"""config.json of CLIP models as transformers writes it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.transformer import check_types

ACTIVATIONS = ("quick_gelu", "gelu")


@dataclass(frozen=True)
class TextConfig:
  """The fields of a text encoder that the computation needs, with transformers' defaults."""

  vocab_size: int = 49408
  hidden_size: int = 512
  intermediate_size: int = 2048
  projection_dim: int = 512
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  max_position_embeddings: int = 77
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  eos_token_id: int = 49407

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "TextConfig":
    """Reads config.json; transformers' many fields without a part in the computation are skipped.

    Raises:
      UserError: another model type, or values that do not fit together.
    """
    return _build(cls, config, "clip_text_model")


@dataclass(frozen=True)
class VisionConfig:
  """The fields of an image encoder that the computation needs, with transformers' defaults."""

  hidden_size: int = 768
  intermediate_size: int = 3072
  projection_dim: int = 512
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  num_channels: int = 3
  image_size: int = 224
  patch_size: int = 32
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "VisionConfig":
    """Reads config.json; see `TextConfig.from_dict`."""
    return _build(cls, config, "clip_vision_model")


@dataclass(frozen=True)
class CLIPConfig:
  """Both encoders and the space they share."""

  text: TextConfig
  vision: VisionConfig
  projection_dim: int = 512
  logit_scale_init_value: float = 2.6592

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "CLIPConfig":
    """Reads a `CLIPModel`'s config.json.

    Old files repeat the encoders' fields under `text_config_dict` and `vision_config_dict`, which
    have the last word there.

    Raises:
      UserError: another model type, or values that do not fit together.
    """
    _check_type(config, "clip")
    text, vision = (
      {**(config.get(f"{name}_config") or {}), **(config.get(f"{name}_config_dict") or {})}
      for name in ("text", "vision")
    )
    rest = {k: config[k] for k in ("projection_dim", "logit_scale_init_value") if k in config}
    return cls(TextConfig.from_dict(text), VisionConfig.from_dict(vision), **rest)


def _check_type(config: Mapping[str, Any], expected: str) -> None:
  # Nested configs of old files have no model_type.
  model_type = config.get("model_type", expected)
  if model_type != expected:
    raise UserError(f"model_type is {model_type!r} in a CLIP config, expected {expected!r}.")


def _build(cls: type, config: Mapping[str, Any], model_type: str) -> Any:
  _check_type(config, model_type)
  values = {f.name: config[f.name] for f in fields(cls) if f.name in config}
  check_types(model_type, cls, values)
  built = cls(**values)
  if built.hidden_act not in ACTIVATIONS:
    raise UserError(f"hidden_act is {built.hidden_act!r}, expected {' or '.join(ACTIVATIONS)}.")
  if built.hidden_size % built.num_attention_heads:
    raise UserError(
      f"hidden_size is {built.hidden_size}, not a multiple of num_attention_heads"
      f" {built.num_attention_heads}."
    )
  return built
