"""Adapters as PEFT and diffusers files.

A directory written here holds `adapter_config.json` and `adapter_model.safetensors`, which PEFT
loads, and `pytorch_lora_weights.safetensors`, which diffusers pipelines load.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which bfloat16 files need
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from rtdmd_jax.errors import UserError
from rtdmd_jax.files import replace_text, save_tensors
from rtdmd_jax.jsontext import parse_json
from rtdmd_jax.models.lora import dense_entries, module_names
from rtdmd_jax.weights.maps import Entry, KeyTable
from rtdmd_jax.weights.safetensors import read_config
from rtdmd_jax.weights.torch_file import load_torch

CONFIG_NAME = "adapter_config.json"
PEFT_NAME = "adapter_model.safetensors"
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"

# Key of diffusers' notes in a file's header, and the prefix of the transformer's part of them.
_METADATA_KEY = "lora_adapter_metadata"
# What wrappers put before a module's name, outermost first.
_PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "transformer.")
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")
# alpha / r of every published RTDMD adapter; its flat files do not say.
_PUBLISHED_SCALE = 2.0
_LARGEST = 3e38  # of float32, about
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.[^.]+)?\.weight")
_ALPHA_KEY = re.compile(r"(?P<module>.+)\.alpha")

# Fields of adapter_config.json whose other values would change the arithmetic.
_PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
  "peft_type": ("LORA",),
  "bias": ("none",),
  "use_rslora": (False, None),
  "use_dora": (False, None),
  "lora_bias": (False, None),
  "fan_in_fan_out": (False, None),
  "rank_pattern": ({}, None),
  "alpha_pattern": ({}, None),
  "modules_to_save": ([], None),
}


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
  """What `save_peft` was given as `notes`; empty where there is no such file or none were."""
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
  """Reads adapters, strictly.

  Keys may start with `base_model.model.` or `transformer.` and may carry the adapter's name
  (`lora_A.default.weight`).

  Args:
    path: a directory of PEFT or diffusers, a directory whose `transformer` is one, one
      safetensors file, or a flat PyTorch file (`generator_ema.pt` of the published code). A lone
      safetensors file takes alpha from its header or its `.alpha` keys; without either alpha is
      the rank, as in diffusers. A PyTorch file takes it from `transformer/adapter_config.json`
      beside it, where the published code puts one, else alpha is twice the rank as published.
    abstract_params: nested dicts of leaves with a shape.
    table: the family's key table.

  Returns:
    (float32 adapter tree without the scale, alpha).

  Raises:
    UserError: missing or broken file, a kind of adapter that is not plain LoRA, or an unknown,
      missing, duplicate or mis-shaped key.
  """
  file, config = _locate(Path(path))
  tensors, alphas, notes = _read(file)
  entries = dense_entries(abstract_params, table)
  adapters = _to_tree(file, tensors, entries)
  ranks = {leaf.shape[-1] for path, leaf in flatten_dict(adapters).items() if path[-1] == "a"}
  if len(ranks) != 1:
    raise UserError(f"{file} mixes ranks {sorted(ranks)}; one rank a file is supported.")
  rank = ranks.pop()
  if config is not None:
    if config["r"] != rank:
      raise UserError(f"{file} has rank {rank}, but {CONFIG_NAME} says r = {config['r']}.")
    return adapters, float(config["lora_alpha"])
  return adapters, _lone_alpha(file, rank, tensors, alphas, notes)


def _locate(path: Path) -> tuple[Path, dict[str, Any] | None]:
  """The weights' file and, for a PEFT directory, its checked config."""
  if path.is_file():
    beside = path.parent / "transformer" / CONFIG_NAME
    described = path.suffix in _TORCH_SUFFIXES and beside.is_file()
    return path, _read_config(beside) if described else None
  for directory in (path, path / "transformer"):
    if (directory / CONFIG_NAME).is_file() or (directory / PEFT_NAME).is_file():
      if not (directory / PEFT_NAME).is_file():
        raise UserError(f"{directory} has {CONFIG_NAME} but no {PEFT_NAME}.")
      return directory / PEFT_NAME, _read_config(directory / CONFIG_NAME)
    if (directory / DIFFUSERS_NAME).is_file():
      return directory / DIFFUSERS_NAME, None
  raise UserError(f"{path} is no adapter: it holds neither {PEFT_NAME} nor {DIFFUSERS_NAME}.")


def _read_config(path: Path) -> dict[str, Any]:
  config = read_config(path.parent, path.name)
  for key in ("r", "lora_alpha"):
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST:
      raise UserError(f"{path} has no positive number {key!r}.")
  for key, plain in _PLAIN_VALUES.items():
    if key in config and config[key] not in plain:
      raise UserError(f"{path}: {key} = {config[key]!r} is not supported, only {plain[0]!r}.")
  return config


def _read(
  file: Path,
) -> tuple[dict[tuple[str, str], tuple[str, np.ndarray]], dict[str, float], dict[str, Any]]:
  """Tensors by (module, "a" | "b") with their keys, alphas by module, and the header's notes."""
  tensors: dict[tuple[str, str], tuple[str, np.ndarray]] = {}
  alphas = {}
  raw, notes = _read_torch(file) if file.suffix in _TORCH_SUFFIXES else _read_safetensors(file)
  for key, tensor in raw.items():
    name = key
    for prefix in _PREFIXES:
      name = name.removeprefix(prefix)
    if match := _KEY.fullmatch(name):
      index = (match["module"], match["part"].lower())
      if index in tensors:
        raise UserError(f"{file}: {key} and {tensors[index][0]} name the same adapter.")
      tensors[index] = (key, tensor)
    elif match := _ALPHA_KEY.fullmatch(name):
      alphas[match["module"]] = _alpha(file, key, tensor if tensor.size == 1 else None)
    else:
      raise UserError(f"{file} holds key {key}, which is no LoRA weight.")
  return tensors, alphas, notes


def _read_safetensors(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Every tensor, and diffusers' notes in the header."""
  try:
    with safe_open(file, framework="numpy") as handle:
      notes = parse_json((handle.metadata() or {}).get(_METADATA_KEY, "{}"), f"{file}, its notes")
      if not isinstance(notes, dict):
        raise UserError(f"{file}: the notes under {_METADATA_KEY} are no JSON object.")
      return {key: handle.get_tensor(key) for key in handle.keys()}, notes
  except (SafetensorError, OSError, TypeError, ValueError) as error:
    raise UserError(f"{file} is not a readable safetensors file ({error}).") from error


def _read_torch(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Every tensor of a flat state dict; notes like a safetensors header's stay empty."""
  state = load_torch(file)
  if not isinstance(state, dict):
    raise UserError(f"{file} holds a {type(state).__name__}, expected a dict of LoRA weights.")
  for key, value in state.items():
    if not isinstance(key, str) or not isinstance(value, np.ndarray):
      raise UserError(f"{file}: entry {key!r} is no tensor; expected a flat dict of LoRA weights.")
  return state, {}


def _to_tree(
  file: Path, tensors: dict[tuple[str, str], tuple[str, np.ndarray]], entries: list[Entry]
) -> dict[str, Any]:
  """Stacks the tensors of each adapted entry; every tensor must be used."""
  known = {name for entry in entries for name in module_names(entry)}
  for (module, _), (key, _) in tensors.items():
    if module not in known:
      raise UserError(f"{file} holds key {key}, but the model has no dense layer {module}.")
  adapted = {module for module, _ in tensors}
  flat = {}
  for entry in entries:
    names = module_names(entry)
    if adapted.isdisjoint(names):
      continue
    for part in ("a", "b"):
      layers = [_layer(file, tensors, name, part, entry) for name in names]
      first = layers[0].shape
      for name, layer in zip(names, layers, strict=True):
        if layer.shape != first:
          raise UserError(f"{file}: {tensors[name, part][0]} has a rank unlike {names[0]}'s.")
      stacked = np.stack(layers) if entry.stacked else layers[0]
      flat[(*entry.path[:-1], part)] = jnp.asarray(stacked)
  if not flat:
    raise UserError(f"{file} holds no LoRA weights.")
  return unflatten_dict(flat)


def _layer(
  file: Path,
  tensors: dict[tuple[str, str], tuple[str, np.ndarray]],
  name: str,
  part: str,
  entry: Entry,
) -> np.ndarray:
  """One adapter half as [in, r] or [r, out], float32, checked against its weight."""
  for needed in ("a", "b"):
    if (name, needed) not in tensors:
      raise UserError(f"{file} lacks key {name}.lora_{needed.upper()}.weight.")
  key, tensor = tensors[name, part]
  rank = tensors[name, "a"][1].shape[0] if tensors[name, "a"][1].ndim else 0
  out_features, in_features = entry.shape
  expected = (rank, in_features) if part == "a" else (out_features, rank)
  if tensor.shape != expected:
    raise UserError(f"{file}: {key} has shape {tensor.shape}, expected {expected}.")
  return tensor.astype(np.float32).T


def _alpha(file: Path, name: str, value: Any) -> float:
  try:
    number = float(np.asarray(value).item())
  except (TypeError, ValueError, OverflowError):
    number = math.nan
  if not 0 < number < _LARGEST:
    raise UserError(f"{file}: {name} is no positive number.")
  return number


def _lone_alpha(
  file: Path,
  rank: int,
  tensors: dict[tuple[str, str], tuple[str, np.ndarray]],
  alphas: dict[str, float],
  notes: dict[str, Any],
) -> float:
  """Alpha of a file without adapter_config.json."""
  noted = notes.get("transformer.lora_alpha", notes.get("lora_alpha"))
  if noted is not None:
    return _alpha(file, "lora_alpha of the notes", noted)
  if not alphas:
    return rank * (_PUBLISHED_SCALE if file.suffix in _TORCH_SUFFIXES else 1.0)
  if set(alphas) != {module for module, _ in tensors} or len(set(alphas.values())) != 1:
    raise UserError(f"{file} has .alpha keys that differ or do not cover every adapter.")
  return next(iter(alphas.values()))
