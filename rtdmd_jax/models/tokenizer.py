"""Tokenizers of the text encoders: directories of transformers, and ids that the encoder has."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rtdmd_jax.errors import UserError

_SETTINGS = "tokenizer_config.json"
_SPIECE = "spiece.model"
_AT_ONCE = 1000


class Limit(NamedTuple):
  """The number of tokens that an encoder reads: its kind, its tokenizer and `length`.

  `text` is what it reads of a prompt, such as a turn of a conversation.
  """

  encoder: str
  tokenizer: Any
  length: int
  text: Callable[[str], str] = str


def load_tokenizer(directory: Path) -> Any:
  """A tokenizer directory of transformers, with `tokenizer.json` or the files it is made of.

  Raises:
    UserError: the directory is missing or not a tokenizer's, or it has no token to pad with.
  """
  from transformers import AutoTokenizer

  _check_vocabulary(directory)
  try:
    tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
  except Exception as error:  # of a broken tokenizer.json the class is no other
    raise UserError(f"{directory} holds no usable tokenizer ({error}).") from error
  if tokenizer.pad_token_id is None:
    raise UserError(f"{directory / _SETTINGS} names no pad_token, which prompts are padded with.")
  return tokenizer


def _check_vocabulary(directory: Path) -> None:
  """Raises UserError where transformers would make a tokenizer that knows no word."""
  if not (directory / _SETTINGS).is_file():
    raise UserError(f"{directory} holds no {_SETTINGS}; give the model's tokenizer.")
  sources = (("tokenizer.json",), ("vocab.json", "merges.txt"))
  if any(all((directory / name).is_file() for name in names) for names in sources):
    return
  if not (directory / _SPIECE).is_file():
    raise UserError(
      f"{directory} holds no tokenizer.json, no vocab.json with merges.txt and no {_SPIECE}; give"
      " the model's tokenizer."
    )
  if importlib.util.find_spec("sentencepiece") is None:
    raise UserError(
      f"{directory} holds {_SPIECE} and no tokenizer.json; fetch tokenizer.json of the same"
      " repository, or pip install sentencepiece, with which transformers reads the other."
    )


def tokenize(tokenizer: Any, prompts: Sequence[str], *, length: int, vocabulary: int) -> np.ndarray:
  """Ids [B, length], padded and truncated; see `checked_ids`."""
  rows = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)
  return checked_ids(tokenizer, rows.input_ids, vocabulary)


def no_tokenizer(prompts: Sequence[str]) -> Any:
  """Stands for a tokenizer where only config files were read."""
  raise ValueError("what config files alone describe has no tokenizers and encodes nothing")


def longer(limit: Limit, prompts: Sequence[str]) -> list[int]:
  """Numbers of the prompts that have more than `limit.length` tokens, special ones counted."""
  texts = [limit.text(prompt) for prompt in prompts]
  # A token of plain ASCII has at least one letter, but for the space that some put in front. Most
  # prompts are too short to be cut by that alone, and tokenizing takes seconds for 25,000.
  free = limit.length - limit.tokenizer.num_special_tokens_to_add() - 1
  doubtful = [i for i, text in enumerate(texts) if len(text) > free or not text.isascii()]
  indices = []
  for start in range(0, len(doubtful), _AT_ONCE):
    part = doubtful[start : start + _AT_ONCE]
    rows = limit.tokenizer([texts[i] for i in part], truncation=False, verbose=False).input_ids
    indices += [i for i, row in zip(part, rows, strict=True) if len(row) > limit.length]
  return indices


def checked_ids(tokenizer: Any, ids: Any, vocabulary: int) -> np.ndarray:
  """Token ids as int32, all of which the encoder has an embedding for.

  On a device a larger id would silently read another token's embedding, or NaN.

  Args:
    tokenizer: what made them.
    ids: integers of any shape.
    vocabulary: the encoder's number of embeddings.

  Raises:
    UserError: an id beyond the embeddings.
  """
  ids = np.array(ids, np.int32)
  if ids.size and ids.max() >= vocabulary:
    token = int(ids.max())
    raise UserError(
      f"{tokenizer.name_or_path}: the token {tokenizer.convert_ids_to_tokens(token)!r} has the id"
      f" {token}, but the text encoder has {vocabulary} embeddings (vocab_size); give the"
      " encoder's own tokenizer, without added tokens."
    )
  return ids
