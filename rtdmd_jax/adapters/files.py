"""Finds and reads an adapter's file, with what is said of it in its header and beside it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 and float8 with numpy
import numpy as np
from safetensors import SafetensorError, safe_open

from rtdmd_jax.adapters.peft_config import AdapterConfig
from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime.json_text import parse_json
from rtdmd_jax.weights.safetensors import read_config, read_tensors
from rtdmd_jax.weights.torch_file import load_torch

CONFIG_NAME = "adapter_config.json"
PEFT_NAME = "adapter_model.safetensors"
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
# alpha / r of every published RTDMD adapter; its flat files do not say.
PUBLISHED_SCALE = 2.0

_PEFT_NAMES = (PEFT_NAME, "adapter_model.bin")
_DIFFUSERS_NAMES = (DIFFUSERS_NAME, "pytorch_lora_weights.bin")
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")
# How the published code names its flat files: generator.pt, generator_ema.pt, fake_score_net.pt.
_PUBLISHED = ("generator", "fake_score")
_PUBLISHED_SUFFIXES = (".pt", ".pth")
# Key of diffusers' notes in a file's header, and the prefix of the transformer's part of them.
_NOTES, _PART = "lora_adapter_metadata", "transformer."
# Words of a header that ought to matter, though no reader of adapters looks at them.
_HEADER_ALPHAS = ("lora_alpha", "alpha", "network_alpha", "ss_network_alpha")
_HEADER_FIELDS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
_NOTHING = ("", "none", "null", "false", "0", "{}")


class AdapterFile(NamedTuple):
  """An adapter's file as it was read.

  Attributes:
    path: the file.
    tensors: floating-point and finite, by key.
    config: what is said of every layer, if anything is.
    default: alpha / r where neither `config` nor the tensors say it; None if it is unknown.
    header_alphas: values of alpha in the header that readers pass over, by name.
  """

  path: Path
  tensors: dict[str, np.ndarray]
  config: AdapterConfig | None
  default: float | None
  header_alphas: Mapping[str, float]


def open_adapter(path: Path) -> AdapterFile:
  """Reads the file of an adapter that a path names.

  Args:
    path: a file, a directory that holds one under PEFT's or diffusers' name or as its only
      safetensors file, or a directory whose `transformer` is one.

  Raises:
    UserError: no adapter, a broken file, or fields that cannot be followed.
  """
  file = _locate(path)
  header: dict[str, str] = {}
  if file.suffix in _TORCH_SUFFIXES:
    tensors = _read_torch(file)
  else:
    tensors, header = read_tensors(file), _header(file)
  _check_tensors(file, tensors)
  return AdapterFile(
    file, tensors, _config(file, tensors, header), _default(file), _header_alphas(file, header)
  )


def _locate(path: Path) -> Path:
  if path.is_file():
    return path
  for directory in (path, path / "transformer"):
    for name in _PEFT_NAMES:
      if (directory / name).is_file():
        return directory / name
    if (directory / CONFIG_NAME).is_file():
      raise UserError(f"{directory} has {CONFIG_NAME} but no {PEFT_NAME}.")
    for name in _DIFFUSERS_NAMES:
      if (directory / name).is_file():
        return directory / name
  candidates = sorted(path.glob("*.safetensors"))
  if len(candidates) == 1:
    return candidates[0]
  several = (
    f" and {len(candidates)} other safetensors files, of which to name one" if candidates else ""
  )
  raise UserError(
    f"{path} is no adapter: it holds neither {PEFT_NAME} nor {DIFFUSERS_NAME}{several}."
  )


def _header(file: Path) -> dict[str, str]:
  try:
    with safe_open(file, framework="numpy") as handle:
      return handle.metadata() or {}
  except (SafetensorError, OSError) as error:
    raise UserError(f"{file} is not a whole safetensors file ({error}).") from error


def _read_torch(file: Path) -> dict[str, np.ndarray]:
  state = load_torch(file)
  if not isinstance(state, dict):
    raise UserError(f"{file} holds a {type(state).__name__}, expected a dict of LoRA weights.")
  for key, value in state.items():
    if not isinstance(key, str) or not isinstance(value, np.ndarray):
      raise UserError(f"{file}: entry {key!r} is no tensor; expected a flat dict of LoRA weights.")
  return state


def _check_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
  for key, tensor in tensors.items():
    # The types of ml_dtypes are of kind V.
    if tensor.dtype.kind not in "fV" and not key.endswith(".alpha"):
      raise UserError(f"{file}: {key} has type {tensor.dtype}; adapters are floating-point.")
    with np.errstate(over="ignore"):
      finite = np.isfinite(tensor.astype(np.float32)).all()
    if not finite:
      raise UserError(f"{file}: {key} holds values that are not finite in float32.")


def _config(
  file: Path, tensors: Mapping[str, np.ndarray], header: Mapping[str, str]
) -> AdapterConfig | None:
  """PEFT's fields for the files that they lie beside, else diffusers' in the header."""
  if file.name in _PEFT_NAMES:
    return _read(file.parent)
  if file.suffix in _PUBLISHED_SUFFIXES:
    for directory in (file.parent, file.parent / "transformer"):
      if (directory / CONFIG_NAME).is_file():
        return _read(directory)
    return None
  if _NOTES in header:
    return _read_notes(file, tensors, header[_NOTES])
  alone = not any((file.parent / name).is_file() for name in _PEFT_NAMES)
  if alone and file.name not in _DIFFUSERS_NAMES and (file.parent / CONFIG_NAME).is_file():
    raise UserError(
      f"{file} lies beside {CONFIG_NAME}, which PEFT reads for {PEFT_NAME} alone; give the file"
      f" that name ({Path(PEFT_NAME).stem}.bin, if PyTorch wrote it), or move it away."
    )
  return None


def _read(directory: Path) -> AdapterConfig:
  return AdapterConfig.read(read_config(directory, CONFIG_NAME), str(directory / CONFIG_NAME))


def _read_notes(file: Path, tensors: Mapping[str, np.ndarray], text: str) -> AdapterConfig | None:
  notes = parse_json(text, f"{file}, its notes")
  if not isinstance(notes, dict):
    raise UserError(f"{file}: the notes under {_NOTES} are no JSON object.")
  if not notes:
    return None
  part = {k.removeprefix(_PART): v for k, v in notes.items() if k.startswith(_PART)}
  if not part and any(key.startswith(_PART) for key in tensors):
    raise UserError(f"{file}: its notes lack the prefix {_PART!r} that its keys have.")
  plain: dict[str, Any] = {k: v for k, v in notes.items() if "." not in k}
  return AdapterConfig.read(part or plain, f"{file}, its notes,", targeted=False)


def _default(file: Path) -> float | None:
  if file.suffix not in _PUBLISHED_SUFFIXES:
    return 1.0
  return PUBLISHED_SCALE if file.stem.startswith(_PUBLISHED) else None


def _header_alphas(file: Path, header: Mapping[str, str]) -> dict[str, float]:
  for name in _HEADER_FIELDS:
    if (value := header.get(name, "")).lower() not in _NOTHING:
      raise UserError(
        f"{file}: {name} = {value!r} in its header is not read by diffusers or PEFT, and not here;"
        f" write it to {CONFIG_NAME} beside {PEFT_NAME}."
      )
  alphas = {}
  for name in _HEADER_ALPHAS:
    if (value := header.get(name, "")).lower() not in _NOTHING:
      try:
        alphas[name] = float(value)
      except ValueError:
        alphas[name] = math.nan
  return alphas
