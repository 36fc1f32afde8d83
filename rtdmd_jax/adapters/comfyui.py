"""Adapters under the names of the models' first releases, which ComfyUI knows models by.

There q, k and v of an attention are one projection (in FLUX.1's single blocks together with the
feed-forward's input), and the last norms give the shift before the scale. An adapter file for
ComfyUI has keys `diffusion_model.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r];
without an `.alpha` key its strength is 1.
"""

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rtdmd_jax.adapters.keys import Fused
from rtdmd_jax.adapters.lora import dense_entries, module_names
from rtdmd_jax.adapters.peft import adapter_layers
from rtdmd_jax.models.transformer import OtherNames, Transformer
from rtdmd_jax.runtime.files import save_tensors
from rtdmd_jax.weights.key_table import Entry

PREFIX = "diffusion_model."


def fused_modules(transformer: Transformer) -> dict[str, Fused]:
  """Every dense layer of the first release by its name there, without a prefix."""
  entries = dense_entries(transformer.init_abstract(), transformer.table)
  return fused_layers(transformer.names, entries)


def fused_layers(names: OtherNames, entries: Iterable[Entry]) -> dict[str, Fused]:
  """`fused_modules` of a family's names and its transformer's dense layers."""
  parts_by_name: dict[str, list[tuple[int, str, int]]] = {}
  inputs, swapped = {}, set()
  for entry in entries:
    for module in module_names(entry):
      name, part = _rename(module, names.first_release)
      if name.endswith("~"):
        name = name.removesuffix("~")
        swapped.add(name)
      outputs, inputs[name] = entry.shape
      parts_by_name.setdefault(name, []).append((part, module, outputs))
  return {
    name: Fused(
      tuple((module, rows) for _, module, rows in sorted(parts)), inputs[name], name in swapped
    )
    for name, parts in parts_by_name.items()
  }


def _rename(module: str, rules: Sequence[tuple[str, str]]) -> tuple[str, int]:
  for pattern, replacement in rules:
    if match := re.fullmatch(pattern, module):
      name, _, part = match.expand(replacement).partition("#")
      return name, int(part or 0)
  raise ValueError(f"{module} has no name in the first release")


def save_comfyui(
  path: str | os.PathLike, adapters: dict[str, Any], transformer: Transformer
) -> None:
  """Writes adapters as one file for ComfyUI, float32.

  A fused projection's adapter is block diagonal: its rank is the sum of its parts' ranks.

  Args:
    path: the safetensors file; it appears whole or not.
    adapters: adapter tree with the scale folded in.
    transformer: what they adapt.
  """
  layers = adapter_layers(adapters, transformer.table)
  tensors = {}
  for name, fused in fused_modules(transformer).items():
    adapted = [module for module, _ in fused.parts if module in layers]
    if not adapted:
      continue
    down = np.concatenate([layers[module][0].T for module in adapted])
    up = np.zeros((sum(rows for _, rows in fused.parts), len(down)), np.float32)
    row = column = 0
    for module, rows in fused.parts:
      if module in layers:
        part = layers[module][1].T
        up[row : row + rows, column : column + part.shape[1]] = part
        column += part.shape[1]
      row += rows
    if fused.swapped:
      up = np.roll(up, len(up) // 2, axis=0)
    tensors[f"{PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(down)
    tensors[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(up)
  save_tensors(path, tensors)
