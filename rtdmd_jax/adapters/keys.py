"""Keys of adapter files: each names a layer of the transformer and a part of its adapter."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from rtdmd_jax.adapters.lora import module_names
from rtdmd_jax.errors import UserError
from rtdmd_jax.weights.key_table import Entry


class Fused(NamedTuple):
  """One dense layer as a file knows it, which may be several of diffusers' side by side.

  Attributes:
    parts: (diffusers' module, its number of outputs), from the first row on.
    inputs: features of the input.
    swapped: the halves of its rows are in the other order.
  """

  parts: tuple[tuple[str, int], ...]
  inputs: int
  swapped: bool = False


class Part(NamedTuple):
  """The meaning of a key.

  Attributes:
    module: the layer's name in the file, without prefixes.
    layer: the layer.
    part: "a" [r, in], "b" [out, r] or "alpha".
  """

  module: str
  layer: Fused
  part: str


# What wrappers and trainers put before a layer's name.
_PREFIXES = (
  "module.",
  "_orig_mod.",
  "base_model.model.",
  "model.diffusion_model.",
  "diffusion_model.",
  "transformer.",
  "lora_unet_",
  "lora_transformer_",
  "lycoris_",
)
_WEIGHT = re.compile(
  r"(?P<module>.+?)(?:\.lora[._]|\.lora_linear_layer\.|(?<=_lora)\.|(?<=_lora[12])\.)"
  r"(?P<part>A|B|down|up)(?:\.[^.]+)?\.weight"
)
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")
_PARTS = {"A": "a", "down": "a", "B": "b", "up": "b"}

_TEXT = re.compile(
  r"((base_model\.model|module)\.)*"
  r"(lora_(prior_)?te\d*_|text_encoders?(_\d+)?\.|te\d?[._]|text_model\.|clip_[lg]\.|t5xxl\.).*"
)
# Found in keys of adapters that are more than, or other than, B A.
_OTHER_KINDS = (
  (r"lora_magnitude_vector|dora_scale", "a magnitude of DoRA"),
  (r"hada_[wt]\d", "a factor of LoHa"),
  (r"lokr_[wt]\d", "a factor of LoKr"),
  (r"(^|[._])b?oft_", "a rotation of OFT"),
  (r"vera_lambda|ia3_|on_input", "a scale of VeRA or IA3"),
  (r"lora_mid\b|lora_embedding_", "a LoRA of a convolution or an embedding"),
  (r"\.diff(_b)?$|\.set_weight$|[._][wb]_norm$", "a change of a whole weight"),
  (r"modules_to_save|\b(query|key)_norm\b", "a whole weight"),
  (r"trainable_tokens|token_adapter|bundle_emb|emb_params", "an embedding of a token"),
  (r"\.bias$", "a bias"),
)


def plain_names(entries: Iterable[Entry]) -> dict[str, Fused]:
  """diffusers' dense layers by their names, with underscores for dots.

  Args:
    entries: see `models.lora.dense_entries`.
  """
  return {
    underscored(module): Fused(((module, entry.shape[0]),), entry.shape[1])
    for entry in entries
    for module in module_names(entry)
  }


def underscored(name: str) -> str:
  """A name with underscores for dots, under which layers are looked up: trainers write either."""
  return name.replace(".", "_")


def parse_key(file: Path, key: str, names: Mapping[str, Fused]) -> Part:
  """The meaning of a key of a file.

  Args:
    file: for messages.
    key: with any of the known prefixes and endings.
    names: every name of a layer, as `plain_names`.

  Raises:
    UserError: an adapter of a text encoder, of another kind, or of no layer of the model.
  """
  if _TEXT.fullmatch(key):
    raise UserError(
      f"{file} holds key {key}, an adapter of a text encoder, which stays as it is here; take the"
      " text encoders' keys out of the file."
    )
  match = _WEIGHT.fullmatch(key) or _ALPHA.fullmatch(key)
  if not match:
    kind = next((words for pattern, words in _OTHER_KINDS if re.search(pattern, key)), None)
    known = f"{kind}; only plain LoRA is supported" if kind else "which is no LoRA weight"
    raise UserError(f"{file} holds key {key}, {known}.")
  place = _find(match["module"], names)
  if place is None:
    raise UserError(f"{file} holds key {key}, but the model has no dense layer {match['module']}.")
  return Part(*place, _PARTS[match["part"]] if "part" in match.groupdict() else "alpha")


def _find(name: str, names: Mapping[str, Fused]) -> tuple[str, Fused] | None:
  """A name without its prefixes, and the layer."""
  while True:
    if layer := names.get(underscored(name)):
      return name, layer
    prefix = next((p for p in _PREFIXES if name.startswith(p)), None)
    if prefix is None:
      return None
    name = name.removeprefix(prefix)
