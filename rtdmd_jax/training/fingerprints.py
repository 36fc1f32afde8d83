"""Fingerprints of what a run reads, by which a resumed one sees that it reads something else.

Names are keys of the configuration; a part of what the key names follows after a comma.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rtdmd_jax.datasets.prompts import Prompt, load_prompts
from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime.checksum import fingerprint
from rtdmd_jax.runtime.multihost import digest
from rtdmd_jax.training.setup import Setup
from rtdmd_jax.weights.hub import find
from rtdmd_jax.weights.reward_files import PATHS, option_kind

# Of a pipeline; the transformer's weights are compared as they lie on the devices.
_PIPELINE_FILES = (
  "model_index.json",
  "scheduler/scheduler_config.json",
  "transformer/config.json",
  "vae/*",
  "text_encoder*/*",
  "tokenizer*/*",
)
# Of larger files so many blocks of so many bytes are read, evenly spread: in 5 GB one every 1.2 MB,
# of which a changed matrix has several.
_WHOLE, _BLOCKS, _BLOCK = 2**28, 2**12, 2**16


def prompt_sets(config: Any) -> dict[str, list[Prompt]]:
  """Every prompt file of a run by its key; those that cannot be read are left out.

  `data.prompts` is trained on, the others are held out.
  """
  paths = {"data.prompts": config.data.prompts, "data.held_out": config.data.held_out}
  for name, options in _rewards(config):
    if options.get("held_out"):
      paths[f"{name}.held_out"] = options["held_out"]
  sets = {}
  for key, path in paths.items():
    split = "train" if key == "data.prompts" else "test"
    try:
      sets[key] = load_prompts(path, split=split, metadata=True)
    except UserError:  # whoever needs them says so
      continue
  return sets


def overlap(sets: Mapping[str, Sequence[Prompt]]) -> dict[str, list[int]] | None:
  """The number of prompts that are trained on as well, and of all, for each held-out set.

  Case and spaces make no difference. None if the training prompts are not known.
  """
  if "data.prompts" not in sets:
    return None
  trained = {_plain(p.text) for p in sets["data.prompts"]}
  return {
    key: [sum(_plain(p.text) in trained for p in prompts), len(prompts)]
    for key, prompts in sets.items()
    if key != "data.prompts"
  }


def of_files(config: Any, sets: Mapping[str, Sequence[Prompt]]) -> dict[str, str]:
  """Fingerprints of prompts, and of the files of text encoders, tokenizers, decoder and rewards.

  Args:
    config: of a run.
    sets: its `prompt_sets`.
  """
  fingerprints = {key: digest([p.record for p in prompts]) for key, prompts in sets.items()}
  directory = find(config.model.pretrained)
  for part, files in _pipeline_files(directory).items() if directory else ():
    fingerprints[f"model.pretrained, {part}"] = _digest(files)
  for name, options in _rewards(config):
    for key in PATHS:
      if isinstance(options.get(key), str) and (path := _reward_path(name, key, options)):
        fingerprints[f"{name}.{key}"] = _digest(_files(path))
  return fingerprints


def of_weights(setup: Setup) -> dict[str, str]:
  """Fingerprints of the transformers and earlier adapters as they lie on the devices."""
  roles, frozen = setup.roles, setup.frozen
  trees = {
    role: frozen.bases[getattr(roles, role)] for role in ("generator", "fake_score", "teacher")
  }
  trees |= {"load.generator": frozen.generator, "load.fake_score": frozen.fake_score}
  return {name: fingerprint(tree) for name, tree in trees.items()}


def _rewards(config: Any) -> Iterator[tuple[str, Any]]:
  for prefix, section in (("rewards", config.rewards), ("eval.rewards", config.eval.rewards)):
    for name, options in section.items():
      yield f"{prefix}.{name}", options


def _reward_path(name: str, key: str, options: Mapping[str, Any]) -> Path | None:
  """Where a reward's option lies on this machine; None if it is not there."""
  kind = option_kind(name.rpartition("rewards.")[2], key, options)
  path = find(options[key], kind) if kind else Path(options[key])
  return path if path is not None and path.exists() else None


def _plain(text: str) -> str:
  return " ".join(text.casefold().split())


def _pipeline_files(directory: Path) -> dict[str, list[Path]]:
  """The `_PIPELINE_FILES` that are in a pipeline's folder, by component."""
  files: dict[str, list[Path]] = {}
  for pattern in _PIPELINE_FILES:
    for file in directory.glob(pattern):
      if file.is_file():
        files.setdefault(file.relative_to(directory).parts[0], []).append(file)
  return files


def _files(path: Path) -> list[Path]:
  """A file, or all of a folder and below, hidden ones left out."""
  if path.is_file():
    return [path]
  inner = (file for file in path.rglob("*") if file.is_file())
  return [f for f in inner if not any(p.startswith(".") for p in f.relative_to(path).parts)]


def _digest(files: Sequence[Path]) -> str:
  """Twelve hexadecimal digits of files' names, sizes and content, of large ones by blocks."""
  total = hashlib.sha256()
  for file in sorted(files):
    size = file.stat().st_size
    total.update(f"{file.name} {size}\n".encode())
    with file.open("rb") as stream:
      if size <= _WHOLE:
        total.update(stream.read())
        continue
      for number in range(_BLOCKS):
        stream.seek((size - _BLOCK) * number // (_BLOCKS - 1))
        total.update(stream.read(_BLOCK))
  return total.hexdigest()[:12]
