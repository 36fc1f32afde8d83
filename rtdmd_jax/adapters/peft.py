"""Adapters as PEFT and diffusers files.

A directory written here holds `adapter_config.json` and `adapter_model.safetensors`, which PEFT
loads, and `pytorch_lora_weights.safetensors`, which diffusers pipelines load.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError, safe_open

from rtdmd_jax.adapters.files import CONFIG_NAME, DIFFUSERS_NAME, PEFT_NAME
from rtdmd_jax.adapters.keys import plain_names
from rtdmd_jax.adapters.layers import read_layers
from rtdmd_jax.adapters.lora import dense_entries, stack_layers
from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime.files import replace_text, save_tensors
from rtdmd_jax.weights.key_table import KeyTable


def save_peft(
  directory: str | os.PathLike,
  adapters: dict[str, Any],
  table: KeyTable,
  *,
  rank: int,
  alpha: float,
  targets: Sequence[str],
  notes: Mapping[str, str] | None = None,
) -> None:
  """Writes adapters for PEFT and for diffusers.

  diffusers' file has no reliable place for alpha in all versions, so there the scale alpha / r is
  part of `lora_B` and alpha equals the rank.

  Args:
    directory: made if need be.
    adapters: adapter tree without the scale folded in.
    table: the family's key table.
    rank: r of every adapter.
    alpha: the scale is alpha / r.
    targets: the target names, for PEFT's `target_modules`.
    notes: join the headers' metadata.

  Raises:
    ValueError: an adapter of another rank.
  """
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  tensors = _tensors(adapters, table, rank)
  peft = {f"base_model.model.{key}": value for key, value in tensors.items()}
  scale = np.float32(alpha / rank)
  pipeline = {
    f"transformer.{key}": value * scale if ".lora_B." in key else value
    for key, value in tensors.items()
  }
  config = {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "r": rank,
    "lora_alpha": alpha,
    "target_modules": list(targets),
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "use_rslora": False,
  }
  save_tensors(directory / PEFT_NAME, peft, notes)
  save_tensors(directory / DIFFUSERS_NAME, pipeline, notes)
  replace_text(directory / CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def read_notes(path: str | os.PathLike) -> dict[str, str]:
  """The `notes` that `save_peft` was given; empty where there is no such file or none were."""
  try:
    with safe_open(Path(path) / PEFT_NAME, framework="numpy") as handle:
      return dict(handle.metadata() or {})
  except (SafetensorError, OSError):
    return {}


def adapter_layers(
  adapters: dict[str, Any], table: KeyTable
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Float32 (a [in, r], b [r, out]) of every adapted layer, by the checkpoint's module name."""
  flat = flatten_dict(adapters)
  layers = {}
  for path in [p[:-1] for p in flat if p[-1] == "a"]:
    a, b = (np.asarray(flat[(*path, part)], np.float32) for part in "ab")
    stacked = a.ndim == 3
    names = table.modules(path, len(a) if stacked else 1)
    layers |= zip(names, zip(a, b, strict=True) if stacked else [(a, b)], strict=True)
  return layers


def _tensors(adapters: dict[str, Any], table: KeyTable, rank: int) -> dict[str, np.ndarray]:
  """`<module>.lora_A.weight` [r, in] and `<module>.lora_B.weight` [out, r], float32."""
  tensors = {}
  for name, (a, b) in adapter_layers(adapters, table).items():
    if (a.shape[1], b.shape[0]) != (rank, rank):
      raise ValueError(f"adapter {name} has shapes {a.shape} and {b.shape}, expected rank {rank}")
    for part, array in (("A", a), ("B", b)):
      # safetensors writes the buffer as it lies in memory, so the transposed view is copied.
      tensors[f"{name}.lora_{part}.weight"] = np.ascontiguousarray(array.T)
  return tensors


def load_peft(
  path: str | os.PathLike, abstract_params: Any, table: KeyTable
) -> tuple[dict[str, Any], float]:
  """Reads adapters of one rank and one scale, to train them on; for others see `load_adapters`.

  Args:
    path: a directory or a file, as `load_adapters` takes them, with PEFT's or diffusers' names.
    abstract_params: nested dicts of leaves with a shape.
    table: the family's key table.

  Returns:
    (float32 adapter tree without the scale, alpha).

  Raises:
    UserError: as `read_layers`, or several ranks or scales.
  """
  entries = dense_entries(abstract_params, table)
  layers = read_layers(path, plain_names(entries))
  ranks = {layer.a.shape[1] for layer in layers.values()}
  scales = {layer.scale for layer in layers.values()}
  if len(ranks) > 1 or len(scales) > 1:
    raise UserError(
      f"{path} mixes ranks {sorted(ranks)} and scales {sorted(scales)}; one of each is supported"
      " where adapters are trained further."
    )
  tree = stack_layers({module: (x.a, x.b) for module, x in layers.items()}, entries)
  return tree, scales.pop() * ranks.pop()
