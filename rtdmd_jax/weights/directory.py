"""Model directories as diffusers, transformers and the hub lay them out: config and weight files.

Weights are one `*.safetensors` file, or shards with an index. Both may be a variant (`fp16` in
`model.fp16.safetensors`), which is read where the plain weights are missing.
"""

import os
import re
from pathlib import Path
from typing import Any

from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime.json_text import parse_json

_STEM = r"(?:diffusion_pytorch_model|model)"
_WEIGHTS = re.compile(rf"{_STEM}(?:\.(?P<variant>[^.]+))?\.safetensors")
# Older releases wrote the variant before `index`.
_INDEX = re.compile(
  rf"{_STEM}\.safetensors(?:\.(?P<old>[^.]+))?\.index(?:\.(?P<variant>[^.]+))?\.json"
)
_SHARD = re.compile(r".*-\d{5}-of-\d{5}(\.[^.]+)?\.safetensors")
# Weights of other formats, for the message about a directory without safetensors.
_OTHER_SUFFIXES = (".bin", ".pt", ".pth", ".gguf", ".msgpack", ".onnx", ".h5")


def read_config(directory: str | os.PathLike, name: str = "config.json") -> dict[str, Any]:
  """Reads `config.json`, or another JSON file, of a model directory.

  Raises:
    UserError: no such directory or file, or the file is not a JSON object.
  """
  directory = Path(directory)
  if not directory.is_dir():
    raise UserError(f"{directory} is not a directory; give a model directory with a {name}.")
  return _read_json(directory / name)


def _read_json(path: Path) -> dict[str, Any]:
  try:
    text = path.read_bytes()
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}).") from error
  value = parse_json(text, str(path))
  if not isinstance(value, dict):
    raise UserError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
  return value


def weight_files(path: str | os.PathLike) -> dict[Path, frozenset[str]]:
  """The safetensors files of a checkpoint and the keys that its index promises in each.

  Args:
    path: a file, or a directory. Of a directory the plain weights are taken, else its only
      variant, else its only other safetensors file.

  Raises:
    UserError: no weights, weights of another format, or several candidates.
  """
  path = Path(path)
  if path.is_file():
    return _only_safetensors(path)
  if not path.is_dir():
    raise UserError(f"{path} does not exist; give a .safetensors file or a model directory.")
  candidates = _candidates(path)
  if len(candidates) > 1:
    listed = ", ".join(file.name for file in candidates)
    raise UserError(f"{path} holds several checkpoints ({listed}); keep one or name one file.")
  if candidates[0].suffix != ".json":
    return {candidates[0]: frozenset()}
  files = _indexed(candidates[0])
  for file in files:
    if not file.is_file():
      raise UserError(f"{file} is missing, although {candidates[0]} lists it.")
  return files


def _only_safetensors(file: Path) -> dict[Path, frozenset[str]]:
  if file.suffix in _OTHER_SUFFIXES:
    raise UserError(
      f"{file} is a {file.suffix} file; give weights of this model as .safetensors, unquantised."
    )
  return {file: frozenset()}


def _candidates(path: Path) -> list[Path]:
  """The files that the weights may start from: one, unless the directory is ambiguous."""
  files = sorted(file for file in path.iterdir() if file.is_file())
  by_variant: dict[str, list[Path]] = {}
  for file in files:
    match = _WEIGHTS.fullmatch(file.name) if not _SHARD.fullmatch(file.name) else None
    match = match or _INDEX.fullmatch(file.name)
    if match:
      named = match.groupdict()
      variant = named["variant"] or named.get("old") or ""
      by_variant.setdefault(variant, []).append(file)
  plain = by_variant.pop("", [])
  # Whoever fetches one variant and all JSON files has the index of the other weights, too.
  if plain and not (by_variant and all(map(_lacks_shards, plain))):
    return plain
  if by_variant:
    return [file for variant in by_variant.values() for file in variant]
  index = [file for file in files if file.name.endswith(".safetensors.index.json")]
  others = [file for file in files if file.suffix == ".safetensors"]
  whole = [file for file in others if not _SHARD.fullmatch(file.name)]
  if index or whole:
    return [*index, *whole]
  if others:
    raise UserError(f"{path} holds {others[0].name}, but not the .safetensors.index.json of it.")
  strange = next((f.name for f in files if f.suffix in _OTHER_SUFFIXES), None)
  instead = f" (but {strange}, which is not read)" if strange else ""
  raise UserError(f"{path} holds no .safetensors file and no .safetensors.index.json{instead}.")


def _lacks_shards(file: Path) -> bool:
  return file.suffix == ".json" and not any(shard.is_file() for shard in _indexed(file))


def _indexed(index: Path) -> dict[Path, frozenset[str]]:
  weight_map = _read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
    raise UserError(f'{index} has no "weight_map" from keys to file names.')
  files: dict[Path, set[str]] = {}
  for key, name in weight_map.items():
    files.setdefault(index.parent / name, set()).add(key)
  return {file: frozenset(keys) for file, keys in files.items()}
