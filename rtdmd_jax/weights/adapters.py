"""Adapters that a user names: one file or several, of any kind, each with its strength."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rtdmd_jax.errors import UserError
from rtdmd_jax.hub import local_path
from rtdmd_jax.models.lora import fold_scale, stack_adapters
from rtdmd_jax.models.transformer import Transformer
from rtdmd_jax.roles import scale_adapters
from rtdmd_jax.weights.native import is_native, load_native
from rtdmd_jax.weights.peft import load_peft


class Lora(NamedTuple):
  """An adapter's file or directory, and the strength that multiplies what it adds."""

  path: Path
  scale: float = 1.0

  @classmethod
  def parse(cls, value: str | Mapping[str, Any]) -> "Lora":
    """Reads `PATH`, `PATH:SCALE` or `{"path": ..., "scale": ...}`.

    Raises:
      UserError: another key, no path, or a scale that is no number.
    """
    if isinstance(value, str):
      path, separator, scale = value.rpartition(":")
      try:
        return cls(Path(path), float(scale)) if separator else cls(Path(value))
      except ValueError:
        return cls(Path(value))
    if not isinstance(value, Mapping) or not {"path"} <= set(value) <= {"path", "scale"}:
      raise UserError(f"a lora is {value!r}; write PATH, PATH:SCALE or a path and a scale.")
    scale = value.get("scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
      raise UserError(f"the scale of lora {value['path']} is {scale!r}; give a number.")
    return cls(Path(value["path"]), float(scale))


def load_adapters(loras: Sequence[Lora], transformer: Transformer) -> dict[str, Any]:
  """Reads adapters in order and stacks them into one tree.

  Args:
    loras: each a PEFT or diffusers directory, a safetensors file with diffusers', PEFT's or the
      original model's names (as ComfyUI has them), or a flat PyTorch file; or a repository or a
      file of one (see `hub`).
    transformer: what they adapt.

  Returns:
    A float32 adapter tree with every scale folded in, ready to be a Flax collection; empty for no
    adapters. Where several adapt a layer, ranks add up.

  Raises:
    UserError: no such path; see `load_peft` and `load_native`.
  """
  stacked: dict[str, Any] = {}
  abstract = transformer.init_abstract() if loras else None
  for lora in loras:
    path = local_path(lora.path, "adapter")
    if not path.exists():
      raise UserError(f"lora {path} does not exist; name an adapter's file or directory.")
    if is_native(path):
      adapters = load_native(path, transformer)
    else:
      unscaled, alpha = load_peft(path, abstract, transformer.table)
      adapters = fold_scale(unscaled, alpha)
    stacked = stack_adapters(stacked, scale_adapters(adapters, lora.scale))
  return stacked
