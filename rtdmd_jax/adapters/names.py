"""Every name that a trainer may give a dense layer of a family."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rtdmd_jax.adapters.comfyui import fused_layers
from rtdmd_jax.adapters.keys import Fused, plain_names, underscored
from rtdmd_jax.models.transformer import OtherNames
from rtdmd_jax.weights.key_table import Entry

# What attention processors of older diffusers called their projections' adapters.
_PROCESSOR = (r"(.+\.attn)\.(to_[qkv]|to_out)(?:\.0)?", (r"\1.processor.\2_lora", r"\1.\2_lora"))


def layer_names(other: OtherNames, entries: Sequence[Entry]) -> dict[str, Fused]:
  """The dense layers of a transformer by each of their names, with underscores for dots.

  diffusers' names, the first release's (kohya's sd-scripts, musubi-tuner, ai-toolkit, fal and
  ComfyUI use them), those of older diffusers and, for FLUX.1, XLabs'.

  Args:
    other: the family's names outside of diffusers.
    entries: the transformer's dense layers, see `adapters.lora.dense_entries`.
  """
  names = plain_names(entries)
  first_release = fused_layers(other, entries)
  for name, layer in (
    *first_release.items(),
    *_older(names.values()),
    *_of_first_release(first_release, other.of_first_release),
    *_of_diffusers(names.values(), other.of_diffusers),
  ):
    if names.setdefault(underscored(name), layer) != layer:
      raise ValueError(f"{name} names two layers")
  return names


def _older(layers: Iterable[Fused]) -> Iterator[tuple[str, Fused]]:
  pattern, replacements = _PROCESSOR
  for layer in layers:
    if match := re.fullmatch(pattern, layer.parts[0][0]):
      yield from ((match.expand(replacement), layer) for replacement in replacements)


def _of_first_release(
  layers: Mapping[str, Fused], rules: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, Fused]]:
  for name, layer in layers.items():
    for pattern, replacement in rules:
      if match := re.fullmatch(pattern, name):
        # The feed-forward's input lies beside q, k and v only in the first release.
        yield match.expand(replacement), layer._replace(parts=layer.parts[:3])


def _of_diffusers(
  layers: Iterable[Fused], rules: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, Fused]]:
  for layer in layers:
    for pattern, replacement in rules:
      if match := re.fullmatch(pattern, layer.parts[0][0]):
        yield match.expand(replacement), layer
