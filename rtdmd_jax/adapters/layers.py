"""The adapters of a file, layer by layer and each with its own scale."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rtdmd_jax.adapters.files import CONFIG_NAME, AdapterFile, open_adapter
from rtdmd_jax.adapters.keys import Fused, parse_key
from rtdmd_jax.adapters.peft_config import positive
from rtdmd_jax.errors import UserError


class Layer(NamedTuple):
  """The adapter of one dense layer: `scale * a b` is added to its kernel [in, out].

  Attributes:
    a: [in, r] float32.
    b: [r, out] float32.
    scale: alpha / r, or what stands for it.
  """

  a: np.ndarray
  b: np.ndarray
  scale: float


class _Adapter(NamedTuple):
  """An adapter as the file has it: its layer's name there, and tensors with keys by part."""

  module: str
  parts: dict[str, tuple[str, np.ndarray]]


def read_layers(path: str | os.PathLike, names: Mapping[str, Fused]) -> dict[str, Layer]:
  """Reads every adapter of a file.

  Args:
    path: see `open_adapter`.
    names: the layers that may be adapted, by every name they may have; see `adapter_keys`.

  Returns:
    Adapters by diffusers' module. One of a fused projection is split.

  Raises:
    UserError: a broken file, an unknown, missing, duplicate or mis-shaped key, a kind of adapter
      that is not plain LoRA, or a scale that is contradictory or unknown.
  """
  file = open_adapter(Path(path))
  adapters = _grouped(file, names)
  if not adapters:
    raise UserError(f"{file.path} holds no LoRA weights.")
  with_alpha = [layer for layer, adapter in adapters.items() if "alpha" in adapter.parts]
  if with_alpha and len(with_alpha) < len(adapters):
    without = next(a.module for a in adapters.values() if "alpha" not in a.parts)
    raise UserError(f"{file.path} has .alpha keys, but none of {without}.")
  layers: dict[str, Layer] = {}
  for layer, adapter in adapters.items():
    down, up = _halves(file.path, layer, adapter)
    for module, part in _split(layer, down, up, _scale(file, adapter, len(down))).items():
      if module in layers:
        raise UserError(f"{file.path} adapts {module} twice, once within {adapter.module}.")
      layers[module] = part
  return layers


def _grouped(file: AdapterFile, names: Mapping[str, Fused]) -> dict[Fused, _Adapter]:
  adapters: dict[Fused, _Adapter] = {}
  for key, tensor in file.tensors.items():
    module, layer, part = parse_key(file.path, key, names)
    parts = adapters.setdefault(layer, _Adapter(module, {})).parts
    if part in parts:
      raise UserError(f"{file.path}: {key} and {parts[part][0]} name the same adapter.")
    parts[part] = (key, tensor)
  return adapters


def _halves(path: Path, layer: Fused, adapter: _Adapter) -> tuple[np.ndarray, np.ndarray]:
  """A [r, in] and B [out, r], float32, checked against the layer."""
  for part, names in (("a", "lora_A or lora_down"), ("b", "lora_B or lora_up")):
    if part not in adapter.parts:
      raise UserError(f"{path} lacks {names} of {adapter.module}.")
  (down_key, down), (up_key, up) = (adapter.parts[part] for part in "ab")
  rank = down.shape[0] if down.ndim else 0
  outputs = sum(rows for _, rows in layer.parts)
  for key, tensor, shape in (
    (down_key, down, (rank, layer.inputs)),
    (up_key, up, (outputs, rank)),
  ):
    if tensor.shape != shape or not rank:
      raise UserError(f"{path}: {key} has shape {tensor.shape}, expected {shape}.")
  return down.astype(np.float32), up.astype(np.float32)


def _scale(file: AdapterFile, adapter: _Adapter, rank: int) -> float:
  """The statements about an adapter: by PEFT's fields, by its `.alpha`, or by the kind of file."""
  path, said = file.path, adapter.parts.get("alpha")
  if file.config is not None:
    if said is not None:
      raise UserError(f"{path} holds {said[0]}, although {file.config.source} says alpha as well.")
    return file.config.scale(adapter.module, rank)
  if said is not None:
    key, value = said
    return positive(str(path), key, float(value.item()) if value.size == 1 else None) / rank
  if file.default is None:
    raise UserError(
      f"{path} says no alpha; put {CONFIG_NAME} with r and lora_alpha beside it, or, if it is one"
      " of RTDMD's published files, leave it the name it had (generator*.pt, fake_score*.pt)."
    )
  for name, alpha in file.header_alphas.items():
    if alpha != rank:
      raise UserError(
        f"{path}: {name} in its header is {alpha:g} while {adapter.module} has rank {rank} and no"
        " .alpha key, and diffusers and PEFT read no alpha there. Name the file"
        f" adapter_model.safetensors and put {CONFIG_NAME} with r and lora_alpha beside it."
      )
  return file.default


def _split(layer: Fused, down: np.ndarray, up: np.ndarray, scale: float) -> dict[str, Layer]:
  """The adapters of diffusers' modules that a layer is made of."""
  if layer.swapped:
    up = np.roll(up, len(up) // 2, axis=0)
  if len(layer.parts) == 1:
    return {layer.parts[0][0]: Layer(down.T, up.T, scale)}
  layers, row = {}, 0
  for module, rows in layer.parts:
    part = up[row : row + rows]
    row += rows
    # Columns of zeros are other modules' part of a block-diagonal adapter.
    used = part.any(axis=0)
    if used.any():
      layers[module] = Layer(down[used].T, part[:, used].T, scale)
  return layers
