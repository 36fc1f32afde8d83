"""Tokenizers of the text encoders: directories of transformers, and ids that the encoder has."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rtdmd_jax.errors import UserError

_SETTINGS = "tokenizer_config.json"
_SPIECE = "spiece.model"


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
