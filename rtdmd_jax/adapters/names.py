"""Every name that a trainer may give a dense layer of a family."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rtdmd_jax.adapters.comfyui import fused_layers
from rtdmd_jax.adapters.keys import Fused, plain_names, underscored
from rtdmd_jax.models.flux1 import Flux1Config
from rtdmd_jax.models.flux2 import Flux2Config
from rtdmd_jax.weights.key_table import Entry

# What attention processors of older diffusers called their projections' adapters.
_PROCESSOR = (r"(.+\.attn)\.(to_[qkv]|to_out)(?:\.0)?", (r"\1.processor.\2_lora", r"\1.\2_lora"))
# XLabs' names of FLUX.1's first-release layers; 1 is the image, 2 the text.
_XLABS = (
  (r"(double_blocks\.\d+)\.img_attn\.(qkv|proj)", r"\1.processor.\2_lora1"),
  (r"(double_blocks\.\d+)\.txt_attn\.(qkv|proj)", r"\1.processor.\2_lora2"),
  (r"(single_blocks\.\d+)\.linear1", r"\1.processor.qkv_lora"),
  (r"(single_blocks\.\d+)\.linear2", r"\1.processor.proj_lora"),
)


def layer_names(config: Any, entries: Sequence[Entry]) -> dict[str, Fused]:
  """The dense layers of a transformer by each of their names, with underscores for dots.

  diffusers' names, the first release's (kohya's sd-scripts, musubi-tuner, ai-toolkit, fal and
  ComfyUI use them), those of older diffusers and, for FLUX.1, XLabs'.

  Args:
    config: of its family.
    entries: its dense layers, see `models.lora.dense_entries`.
  """
  names = plain_names(entries)
  native = fused_layers(config, entries)
  for name, layer in (
    *native.items(),
    *_older(names.values()),
    *(_xlabs(native) if isinstance(config, Flux1Config) else ()),
    *(_shortened(names.values()) if isinstance(config, Flux2Config) else ()),
  ):
    if names.setdefault(underscored(name), layer) != layer:
      raise ValueError(f"{name} names two layers")
  return names


def _older(layers: Iterable[Fused]) -> Iterator[tuple[str, Fused]]:
  pattern, replacements = _PROCESSOR
  for layer in layers:
    if match := re.fullmatch(pattern, layer.parts[0][0]):
      yield from ((match.expand(replacement), layer) for replacement in replacements)


def _xlabs(native: Mapping[str, Fused]) -> Iterator[tuple[str, Fused]]:
  for name, layer in native.items():
    for pattern, replacement in _XLABS:
      if match := re.fullmatch(pattern, name):
        # The feed-forward's input lies beside q, k and v only in the first release.
        yield match.expand(replacement), layer._replace(parts=layer.parts[:3])


def _shortened(layers: Iterable[Fused]) -> Iterator[tuple[str, Fused]]:
  """Some exports of FLUX.2 lost the start of `transformer_blocks`; diffusers reads them too."""
  for layer in layers:
    name = layer.parts[0][0]
    if name.startswith("transformer_blocks."):
      yield name.removeprefix("tran"), layer
