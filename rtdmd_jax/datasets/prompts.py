"""Prompt files and the order in which training visits them."""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime.json_text import parse_json
from rtdmd_jax.weights.downloads import where_prompts

# File names of the published prompt sets, in the order in which a folder is searched.
_NAMES = {
  "train": ("train.txt", "train.jsonl", "train_metadata.jsonl", "prompts.json", "prompts.txt"),
  "test": (
    "test.txt",
    "test.jsonl",
    "test_metadata.jsonl",
    "prompts.json",
    "prompts.txt",
    "metadata.jsonl",
  ),
}


@dataclass(frozen=True)
class Prompt:
  """A prompt and its source.

  Attributes:
    text: the prompt.
    record: the whole record of the file (`tag`, `include`, `vqa_list`, ...), or `{"prompt": text}`
      where the file holds bare strings.
  """

  text: str
  record: dict[str, Any]


def load_prompts(path: str | Path, *, split: str = "train", metadata: bool = False) -> list[Prompt]:
  """Read a prompt file, or the first of the published names found in a folder.

  `.txt` and `.text`: a prompt on each non-empty line. `.jsonl`: a string, or an object with
  `prompt` or `text`, on each non-empty line (GenEval and GenEval2 metadata are such files).
  `.json`: a list of those. A folder may also be a TFDS dataset that `datasets/prompt_set.py`
  prepared.

  Args:
    path: the file or folder.
    split: `"train"` or `"test"`: which names a folder is searched for.
    metadata: prefer `<split>_metadata.jsonl` in a folder that has several files.

  Raises:
    UserError: nothing found, another extension, an empty file, or a broken line (file and line
      number are named).
  """
  if split not in _NAMES:
    raise ValueError(f"split must be train or test, not {split!r}")
  if (Path(path) / "dataset_info.json").is_file():
    return _prepared(Path(path), split)
  file = _find(Path(path), split, metadata)
  if file.suffix not in _READERS:
    raise UserError(f"{file}: prompt files end in {', '.join(_READERS)}, not {file.suffix!r}")
  prompts = [_prompt(value, place) for place, value in _READERS[file.suffix](file)]
  if not prompts:
    raise UserError(f"{file} holds no prompts; give a file with at least one")
  return prompts


def prompt_batch(
  seed: int, step: int, num_prompts_total: int, prompts_per_batch: int, images_per_prompt: int
) -> tuple[np.ndarray, np.ndarray]:
  """Prompts of global batch `step`, each repeated `images_per_prompt` times next to itself.

  A pure function of its arguments, so a resumed run continues the same sequence and any number of
  hosts sees the same batches. The list is permuted anew in each pass; consecutive batches of a pass
  share no prompt, and the prompts left over at its end wait for a later pass, so the prompts of one
  batch are distinct.

  Args:
    seed: of the permutations, in 0 .. 2**32 - 1.
    step: number of the global batch, from 0.
    num_prompts_total: length of the prompt list.
    prompts_per_batch: distinct prompts in a global batch.
    images_per_prompt: images of each prompt in a global batch (`K_img` in RTDMD).

  Returns:
    Prompt indices `[N]` int64 and sample indices `[N]` uint32, with `N = prompts_per_batch *
    images_per_prompt`. Sample indices count all samples since step 0 (modulo 2**32), to
    fold into random keys.

  Raises:
    UserError: the list has fewer prompts than a batch.
    ValueError: a count below 1 or a negative step.
  """
  if min(num_prompts_total, prompts_per_batch, images_per_prompt) < 1 or step < 0:
    raise ValueError(
      f"need positive counts and step >= 0, got {num_prompts_total} prompts, "
      f"{prompts_per_batch} a batch, {images_per_prompt} images_per_prompt, step {step}"
    )
  if num_prompts_total < prompts_per_batch:
    raise UserError(
      f"a batch takes {prompts_per_batch} distinct prompts, but the prompt list has "
      f"{num_prompts_total}; lower the batch size, or raise the images per prompt"
    )
  epoch, batch = divmod(step, num_prompts_total // prompts_per_batch)
  order = _permutation(seed, epoch, num_prompts_total)
  prompts = order[batch * prompts_per_batch : (batch + 1) * prompts_per_batch]
  count = prompts_per_batch * images_per_prompt
  samples = (np.arange(count, dtype=np.uint64) + step * count) % 2**32
  return np.repeat(prompts, images_per_prompt), samples.astype(np.uint32)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
  # RandomState, because its stream is frozen: a newer numpy must not reorder a resumed run.
  order = np.random.RandomState([seed, epoch]).permutation(count).astype(np.int64)
  order.flags.writeable = False
  return order


def _find(path: Path, split: str, metadata: bool) -> Path:
  if path.is_file():
    return path
  if not path.is_dir():
    raise UserError(f"prompt file {path} does not exist{where_prompts(path)}")
  names = list(_NAMES[split])
  if metadata:
    names.sort(key=lambda name: name != f"{split}_metadata.jsonl")
  for name in names:
    if (path / name).is_file():
      return path / name
  raise UserError(f"{path} holds none of the prompt files {', '.join(names)}{where_prompts(path)}")


def _prepared(directory: Path, split: str) -> list[Prompt]:
  """The prompts of a dataset that TFDS prepared."""
  import tensorflow_datasets as tfds  # takes a second, and text files do not need it

  try:
    rows = tfds.builder_from_directory(directory).as_data_source(split)
    return [
      _prompt(parse_json(row["record"], f"{directory}, {split} {i}"), f"{directory}, {split} {i}")
      for i, row in enumerate(rows)
    ]
  except (ValueError, KeyError, OSError, RuntimeError) as error:
    reason = str(error).strip().partition("\n")[0][:200]
    raise UserError(
      f"{directory} has no prompts of the split {split} that can be read ({reason}); prepare it"
      " with python -m rtdmd_jax.datasets.prompt_set."
    ) from error


def _prompt(value: Any, place: str) -> Prompt:
  record = {"prompt": value} if isinstance(value, str) else value
  if not isinstance(record, dict):
    raise UserError(f"{place}: expected a string or an object, not {json.dumps(value)[:60]}")
  text = record.get("prompt", record.get("text"))
  if not isinstance(text, str) or not text.strip():
    raise UserError(f"{place}: needs a non-empty string under 'prompt' or 'text'")
  if any("\ud800" <= letter <= "\udfff" for letter in text):
    raise UserError(f"{place}: the prompt holds half of a surrogate pair, which is no character")
  return Prompt(text.strip(), record)


def _bytes(file: Path) -> bytes:
  try:
    return file.read_bytes()
  except OSError as error:
    raise UserError(f"{file} cannot be read ({error.strerror})") from error


def _lines(file: Path) -> Iterator[tuple[str, str]]:
  """Non-empty stripped lines with `file, line n`."""
  for number, line in enumerate(_bytes(file).split(b"\n"), start=1):
    place = f"{file}, line {number}"
    try:
      text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
      raise UserError(f"{place}: is not UTF-8 ({error.reason})") from error
    if text:
      yield place, text


def _read_jsonl(file: Path) -> Iterator[tuple[str, Any]]:
  for place, line in _lines(file):
    yield place, parse_json(line, place)


def _read_json(file: Path) -> Iterator[tuple[str, Any]]:
  values = parse_json(_bytes(file) or b"[]", str(file))
  if not isinstance(values, list):
    raise UserError(f"{file} must hold a JSON list of prompts, not {type(values).__name__}")
  yield from ((f"{file}, entry {number}", value) for number, value in enumerate(values, start=1))


_READERS = {".txt": _lines, ".text": _lines, ".jsonl": _read_jsonl, ".json": _read_json}
