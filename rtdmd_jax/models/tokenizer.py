"""Prompts to token ids, with the tokenizer files of a checkpoint."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rtdmd_jax.errors import UserError


def load_tokenizer(
  directory: str | os.PathLike, length: int
) -> Callable[[Sequence[str]], np.ndarray]:
  """Loads a tokenizer directory of any family as a function from prompts to ids.

  Rows are padded as the tokenizer says and cut to `length`, special tokens kept.

  Args:
    directory: holds `tokenizer_config.json` and the vocabulary; nothing is downloaded.
    length: number of tokens of every row.

  Returns:
    A function from prompts to int32 [B, length].

  Raises:
    UserError: no tokenizer there.
  """
  # A slow import that only programs which read prompts should pay for.
  from transformers import AutoTokenizer

  if not (Path(directory) / "tokenizer_config.json").is_file():
    raise UserError(f"{directory} holds no tokenizer_config.json; give a tokenizer directory.")
  try:
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
  except (OSError, ValueError) as error:
    raise UserError(f"the tokenizer in {directory} cannot be loaded ({error}).") from error

  def tokenize(prompts: Sequence[str]) -> np.ndarray:
    rows = tokenizer(
      list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="np"
    )
    return rows["input_ids"].astype(np.int32)

  return tokenize
