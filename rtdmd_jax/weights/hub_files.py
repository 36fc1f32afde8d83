"""The files taken of a repository of models, and whether a copy of it is whole."""

import glob
import json
from pathlib import Path, PurePath
from typing import NamedTuple

_TEXTS = ("*.json", "*.txt", "*.model", "*.jinja")
_PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


class Kind(NamedTuple):
  """The files taken of a repository.

  Attributes:
    take: patterns of the files to download.
    leave: patterns of files that are not, although `take` has them.
    needs: files without which a copy in the cache is not whole.
    weights: whether it needs safetensors, too.
  """

  take: tuple[str, ...]
  leave: tuple[str, ...] = ()
  needs: tuple[str, ...] = ()
  weights: bool = False


_ROOT = ("*/*", "*fp16*")
KINDS: dict[str, Kind] = {
  # All that `Pipeline.from_pretrained` reads, without the original single-file weights.
  "pipeline": Kind(
    (*_TEXTS, "*/model*.safetensors", "*/diffusion_pytorch_model*.safetensors"),
    ("*fp16*",), ("model_index.json",),
  ),
  # A pipeline's transformer, or a repository that is one.
  "transformer": Kind(
    ("transformer/*.json", "transformer/*.safetensors", "config.json", "diffusion_pytorch_model*"),
    ("*fp16*", "*.bin"), ("config.json",), weights=True,
  ),
  "network": Kind(("transformer/config.json", "config.json"), needs=("config.json",)),
  # A model of transformers with its processor, without it, and the processor alone.
  "model": Kind(
    (*_TEXTS, "model*.safetensors"), _ROOT,
    ("config.json", "tokenizer_config.json", "preprocessor_config.json"), weights=True,
  ),
  "encoder": Kind((*_TEXTS, "model*.safetensors"), _ROOT, ("config.json",), weights=True),
  "processor": Kind(_TEXTS, ("*/*",), ("tokenizer_config.json", "preprocessor_config.json")),
  "config": Kind(_TEXTS, ("*/*",), ("config.json", "tokenizer_config.json")),
  "tokenizer": Kind(_TEXTS, ("*/*",), ("tokenizer_config.json",)),
  "adapter": Kind((
    "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors",
    "transformer/adapter_*",
  )),
  "hpsv3": Kind(("HPSv3.safetensors", "config.yaml"), needs=("HPSv3.safetensors",)),
  # A single file, which the name must tell.
  "file": Kind(()),
}  # fmt: skip


def lacking(folder: Path, file: str | None, kind: str) -> str | None:
  """The first file that a copy of a repository needs and does not have; None if it is whole.

  Args:
    folder: of the copy.
    file: the one that is wanted of it; None for what `kind` names.
    kind: a name in `KINDS`.
  """
  if file is not None:
    return None if (folder / file).is_file() else file
  if kind == "adapter":
    return None if any(folder.rglob("*.safetensors")) else "adapter_model.safetensors"
  if kind in ("transformer", "network") and (folder / "transformer").is_dir():
    folder = folder / "transformer"
  for name in KINDS[kind].needs:
    if not (folder / name).is_file():
      return name
  if KINDS[kind].weights:
    return _lacks_weights(folder)
  return _lacks_parts(folder) if kind == "pipeline" else None


def _lacks_parts(folder: Path) -> str | None:
  """The same of a pipeline's parts, as its model_index.json lists them."""
  for part, made_by in _read(folder / "model_index.json").items():
    if not isinstance(made_by, list) or None in made_by:
      continue
    if part.startswith("tokenizer"):
      name = "tokenizer_config.json"
    elif part == "scheduler":
      name = "scheduler_config.json"
    elif part in _PARTS:
      name = "config.json"
    else:
      continue
    if not (folder / part / name).is_file():
      return f"{part}/{name}"
    if part in _PARTS and (missing := _lacks_weights(folder / part)):
      return f"{part}/{missing}"
  return None


def _lacks_weights(folder: Path) -> str | None:
  """The same of safetensors, in one file or shards with an index."""
  files = [p for p in folder.glob("*.safetensors*") if "fp16" not in p.name]
  indices = [p for p in files if p.suffix == ".json"]
  for index in indices:
    shards = _read(index).get("weight_map")
    for name in sorted(map(str, shards.values())) if isinstance(shards, dict) else ():
      if not (folder / name).is_file():
        return name
  whole = any(p.suffix == ".safetensors" and "-of-" not in p.name for p in files)
  return None if indices or whole else "*.safetensors"


def _read(file: Path) -> dict:
  """A JSON object; empty if it is not one, of which its own reader tells."""
  try:
    value = json.loads(file.read_bytes())
  except (OSError, ValueError, RecursionError):
    return {}
  return value if isinstance(value, dict) else {}


def patterns(file: str | None, kind: str) -> tuple[list[str], list[str]]:
  """Patterns of the files to download, and of those among them to leave; see `lacking`."""
  if file is None:
    return list(KINDS[kind].take), list(KINDS[kind].leave)
  # What describes a file of weights lies beside it: med_config.json, adapter_config.json.
  folder = glob.escape(PurePath(file).parent.as_posix())
  beside = "" if folder == "." else f"{folder}/"
  return [glob.escape(file), f"{beside}*_config.json"], []
