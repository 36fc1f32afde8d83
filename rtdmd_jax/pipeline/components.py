"""Whether the networks of a pipeline directory fit each other, by their config files alone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.clip_config import TextConfig
from rtdmd_jax.models.encoders import has_projection
from rtdmd_jax.models.flux1 import Flux1Config
from rtdmd_jax.models.flux2 import Flux2Config
from rtdmd_jax.models.qwen3 import Qwen3Config, check_layers
from rtdmd_jax.models.sd3 import SD3Config
from rtdmd_jax.models.t5 import T5Config
from rtdmd_jax.models.vae import VAEConfig
from rtdmd_jax.models.vae_flux2 import Flux2VAEConfig
from rtdmd_jax.pipeline.text import FLUX2_LAYERS, has_t5
from rtdmd_jax.weights.safetensors import read_config

# Latent pixels that the transformers of FLUX take as one token.
_PACKED = 4


class _Parts:
  """The config files of a pipeline, and a sentence for everything that is wrong with them."""

  def __init__(self, directory: Path, transformer: type):
    self.directory, self.problems = directory, []
    self._transformer = self.read("transformer", transformer.from_dict)

  def read(self, part: str, build: Callable[[dict[str, Any]], Any]) -> Any:
    """The result of `build` for a component's config.json; None where it cannot be used."""
    try:
      config = read_config(self.directory / part)
    except UserError as error:
      self.problems.append(str(error))
      return None
    try:
      return build(config)
    except UserError as error:
      self.problems.append(f"{self.directory / part / 'config.json'}: {error}")
      return None

  def match(
    self,
    field: str,
    parts: Sequence[str],
    name: str,
    configs: Sequence[Any],
    *,
    times: int = 1,
    most: bool = False,
  ) -> None:
    """Compares a field of the transformer with the sum of `name` in other components' configs.

    Args:
      field: of the transformer.
      parts: the components' directories.
      name: of their fields.
      configs: their configs; with an unreadable one among them there is nothing to say.
      times: factor of the sum.
      most: the sum may also be less.
    """
    if self._transformer is None or None in configs:
      return
    wanted = getattr(self._transformer, field)
    width = times * sum(getattr(config, name) for config in configs)
    if width == wanted or (most and width < wanted):
      return
    factor = f"{times} x " if times > 1 else ""
    files = " and ".join(f"{part}/config.json" for part in parts)
    self.problems.append(
      f"{self.directory}: {factor}{name} of {files} is {width}, but {field} of"
      f" transformer/config.json is {wanted}; these networks are not of one pipeline."
    )


def sd3_problems(directory: Path, index: Mapping[str, Any]) -> list[str]:
  """Sentences about what does not fit in an SD3 directory, given its model_index.json."""
  parts, towers = _Parts(directory, SD3Config), ("text_encoder", "text_encoder_2")
  parts.match("in_channels", ["vae"], "latent_channels", [parts.read("vae", VAEConfig.from_dict)])
  clip = [parts.read(tower, _projected) for tower in towers]
  parts.match("pooled_projection_dim", towers, "projection_dim", clip)
  # Side by side, padded with zeros to the width of T5.
  parts.match("joint_attention_dim", towers, "hidden_size", clip, most=True)
  t5 = "text_encoder_3"
  if has_t5(index) and not (directory / t5).is_dir():
    parts.problems.append(
      f"{directory} has no {t5}, although model_index.json names it; fetch it and tokenizer_3, or"
      f' write "{t5}": [null, null] and "tokenizer_3": [null, null] there to go without T5.'
    )
  elif has_t5(index):
    parts.match("joint_attention_dim", [t5], "d_model", [parts.read(t5, T5Config.from_dict)])
  return parts.problems


def flux1_problems(directory: Path, index: Mapping[str, Any]) -> list[str]:
  """Sentences about what does not fit in a FLUX.1 directory, given its model_index.json."""
  del index
  parts = _Parts(directory, Flux1Config)
  vae = parts.read("vae", VAEConfig.from_dict)
  parts.match("in_channels", ["vae"], "latent_channels", [vae], times=_PACKED)
  clip = parts.read("text_encoder", TextConfig.from_dict)
  parts.match("pooled_projection_dim", ["text_encoder"], "hidden_size", [clip])
  t5 = parts.read("text_encoder_2", T5Config.from_dict)
  parts.match("joint_attention_dim", ["text_encoder_2"], "d_model", [t5])
  return parts.problems


def flux2_problems(directory: Path, index: Mapping[str, Any]) -> list[str]:
  """Sentences about what does not fit in a FLUX.2-klein directory, given its model_index.json."""
  del index
  parts = _Parts(directory, Flux2Config)
  vae = parts.read("vae", Flux2VAEConfig.from_dict)
  parts.match("in_channels", ["vae"], "latent_channels", [vae], times=_PACKED)
  qwen = parts.read("text_encoder", _deep_enough)
  states = len(FLUX2_LAYERS)
  parts.match("joint_attention_dim", ["text_encoder"], "hidden_size", [qwen], times=states)
  return parts.problems


def _projected(config: Mapping[str, Any]) -> TextConfig:
  if not has_projection(config):
    raise UserError("a CLIPTextModelWithProjection is needed, whose projection is pooled.")
  return TextConfig.from_dict(config)


def _deep_enough(config: Mapping[str, Any]) -> Qwen3Config:
  built = Qwen3Config.from_dict(config)
  check_layers(built, FLUX2_LAYERS)
  return built
