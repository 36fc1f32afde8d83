"""The fields that PEFT keeps beside an adapter: `adapter_config.json`, and diffusers' notes.

A field that changes the arithmetic is followed or refused by its name, also one that is not known
here; a field that says how the adapter was trained is passed over.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rtdmd_jax.errors import UserError

# Beyond this a float32 is infinite.
_LARGEST = 3e38
# Starts after which the base is the published one. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take the
# adapter's first values out of the base, so that such an adapter belongs to another base.
_INITS = ("gaussian", "eva", "orthogonal", "mica")
_FOLLOWED = (
  "r",
  "lora_alpha",
  "use_rslora",
  "rank_pattern",
  "alpha_pattern",
  "init_lora_weights",
  "target_modules",
  "exclude_modules",
  "layers_to_transform",
  "layers_pattern",
)
_OF_TRAINING = (
  "task_type",
  "auto_mapping",
  "peft_version",
  "base_model_name_or_path",
  "revision",
  "inference_mode",
  "lora_dropout",
  "megatron_core",
  "loftq_config",
  "eva_config",
  "corda_config",
  "lora_ga_config",
  "qalora_group_size",
  "runtime_config",
  "ensure_weight_tying",
)
# What the fields that are neither say where they do nothing.
_PLAIN = {"peft_type": ("LORA", None), "bias": ("none", None)}
_NOTHING = (None, False, "", [], {})


def positive(where: str, name: str, value: Any) -> float:
  """A positive number of float32's range.

  Raises:
    UserError: anything else; `where` and `name` say of what.
  """
  if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST:
    raise UserError(f"{where} has no positive number {name!r}.")
  return float(value)


@dataclass(frozen=True)
class AdapterConfig:
  """The strength of each adapter, and the base that they are of.

  Attributes:
    source: where the fields are from, for messages.
    fields: the fields, checked.
    targeted: whether the fields choose layers: PEFT leaves others out, diffusers takes what the
      file has.
  """

  source: str
  fields: Mapping[str, Any]
  targeted: bool

  @classmethod
  def read(
    cls, fields: Mapping[str, Any], source: str, *, targeted: bool = True
  ) -> "AdapterConfig":
    """Checks the fields of an adapter_config.json, or of notes without their prefix.

    Raises:
      UserError: a value of another type, or a kind of adapter that is not plain LoRA.
    """
    for name, value in fields.items():
      plain = _PLAIN.get(name, _NOTHING)
      if name not in (*_FOLLOWED, *_OF_TRAINING) and value not in plain:
        raise UserError(f"{source}: {name} = {value!r} is not supported, only {plain[0]!r}.")
    for name in ("r", "lora_alpha"):
      positive(source, name, fields.get(name))
    for name in ("rank_pattern", "alpha_pattern"):
      pattern = fields.get(name) or {}
      if not isinstance(pattern, Mapping):
        raise UserError(f"{source}: {name} is {pattern!r}; it maps names of layers to numbers.")
      for key, value in pattern.items():
        _compiled(source, name, key)
        positive(f"{source}, {name},", key, value)
    if not isinstance(fields.get("use_rslora"), bool | None):
      raise UserError(f"{source}: use_rslora is {fields['use_rslora']!r}, not true or false.")
    init = fields.get("init_lora_weights")
    if not isinstance(init, bool | None) and not (isinstance(init, str) and init.lower() in _INITS):
      raise UserError(
        f"{source}: init_lora_weights = {init!r} may have changed the base that the adapter belongs"
        f" to; only true, false, {', '.join(_INITS)} leave it as it is. PEFT writes a plain adapter"
        " with save_pretrained(..., path_initial_model_for_weight_conversion=...)."
      )
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
      value = fields.get(name) or []
      if isinstance(value, str):
        _compiled(source, name, value)
      elif not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{source}: {name} is {value!r}, not a list of names.")
    return cls(source, dict(fields), targeted)

  def scale(self, module: str, rank: int) -> float:
    """The factor of B A of a layer: alpha / r, with rank-stabilised LoRA alpha / sqrt(r).

    Args:
      module: the layer's name in the file, without a prefix.
      rank: of its tensors.

    Raises:
      UserError: another rank than the fields say, or a layer that they do not choose.
    """
    if self.targeted and not self._chooses(module):
      raise UserError(
        f"{self.source} leaves out layer {module}, which the file holds an adapter of; PEFT would"
        " pass over it. Take it out of the file or add it to target_modules."
      )
    r = self._by_pattern("rank_pattern", module, self.fields["r"])
    if r != rank:
      raise UserError(f"{self.source} says r = {r} of {module}, whose adapter has rank {rank}.")
    alpha = self._by_pattern("alpha_pattern", module, self.fields["lora_alpha"])
    return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

  def _by_pattern(self, field: str, module: str, otherwise: float) -> float:
    """The value of the first pattern that fits the end of a name, as PEFT has it."""
    for pattern, value in (self.fields.get(field) or {}).items():
      if re.match(rf"(.*\.)?({pattern})$", module):
        return value
    return otherwise

  def _chooses(self, module: str) -> bool:
    """PEFT's rule for target_modules, exclude_modules and layers_to_transform."""
    targets, excluded = self.fields.get("target_modules"), self.fields.get("exclude_modules")
    if excluded and _named(excluded, module):
      return False
    if targets is None or targets == "all-linear":
      return True
    if not _named(targets, module):
      return False
    layers = self.fields.get("layers_to_transform")
    if layers in (None, []) or isinstance(targets, str):
      return True
    patterns = self.fields.get("layers_pattern") or [r"[^.]*"]
    start = r"(?:^|.*?\.)" if self.fields.get("layers_pattern") else r".*?\."
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
      if match := re.match(rf"{start}{pattern}\.(?P<index>\d+)\.", module):
        return int(match["index"]) in (layers if isinstance(layers, list) else [layers])
    return False


def _named(names: str | list[str], module: str) -> bool:
  if isinstance(names, str):
    return re.fullmatch(names, module) is not None
  return any(module == name or module.endswith(f".{name}") for name in names)


def _compiled(source: str, name: str, pattern: str) -> None:
  try:
    re.compile(pattern)
  except (re.error, RecursionError, OverflowError) as error:
    raise UserError(f"{source}: {name} holds {pattern!r}, no regular expression.") from error
