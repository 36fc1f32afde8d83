"""Adapters that a user names: one file or several, of any kind, each with its strength."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rtdmd_jax.adapters.layers import read_layers
from rtdmd_jax.adapters.lora import dense_entries, stack_adapters, stack_layers
from rtdmd_jax.adapters.names import layer_names
from rtdmd_jax.errors import UserError
from rtdmd_jax.models.transformer import Transformer
from rtdmd_jax.weights.hub import local_path


class Lora(NamedTuple):
  """An adapter's file or directory, and the strength that multiplies what it adds."""

  path: Path
  scale: float = 1.0

  @classmethod
  def parse(cls, value: str | Mapping[str, Any]) -> "Lora":
    """Reads `PATH`, `PATH:SCALE` or `{"path": ..., "scale": ...}`.

    Raises:
      UserError: another key, no path, or a scale that is no finite number.
    """
    if isinstance(value, str):
      path, separator, scale = value.rpartition(":")
      try:
        lora = cls(Path(path), float(scale)) if separator else cls(Path(value))
      except ValueError:
        lora = cls(Path(value))
    elif not isinstance(value, Mapping) or not {"path"} <= set(value) <= {"path", "scale"}:
      raise UserError(f"a lora is {value!r}; write PATH, PATH:SCALE or a path and a scale.")
    else:
      lora = cls(Path(value["path"]), value.get("scale", 1.0))
    return lora.checked()

  def checked(self) -> "Lora":
    """Itself, with a scale that is a finite float.

    Raises:
      UserError: it is not.
    """
    number = isinstance(self.scale, int | float) and not isinstance(self.scale, bool)
    if not number or not math.isfinite(self.scale):
      raise UserError(f"the scale of lora {self.path} is {self.scale!r}; give a finite number.")
    return self._replace(scale=float(self.scale))


def load_adapters(loras: Sequence[Lora], transformer: Transformer) -> dict[str, Any]:
  """Reads adapters in order and stacks them into one tree.

  Args:
    loras: each a directory or a file with the names of any trainer, see `adapter_names` for which,
      or a repository or a file of one (see `hub`); without a word on alpha it is the rank, as in
      diffusers.
    transformer: what they adapt.

  Returns:
    A float32 adapter tree with every scale folded in, ready to be a Flax collection; empty for no
    adapters. Where several adapt a layer, ranks add up; layers of a stack that are left out, or
    have a smaller rank than others, have zeros.

  Raises:
    UserError: no such path, or see `read_layers`; or a scale that is not finite.
  """
  stacked: dict[str, Any] = {}
  if not loras:
    return stacked
  entries = dense_entries(transformer.init_abstract(), transformer.table)
  names = layer_names(transformer.names, entries)
  for named, scale in (lora.checked() for lora in loras):
    path = local_path(named, "adapter")
    if not path.exists():
      raise UserError(f"lora {path} does not exist; name an adapter's file or directory.")
    layers = {}
    for module, layer in read_layers(path, names).items():
      with np.errstate(over="ignore"):
        b = layer.b * np.float32(layer.scale * scale)
      if not np.isfinite(b).all():
        raise UserError(f"{path}: {module} overflows at a strength of {layer.scale * scale:g}.")
      layers[module] = (layer.a, b)
    stacked = stack_adapters(stacked, stack_layers(layers, entries))
  return stacked
