"""Keeps libraries of C++ quiet, which write past Python's streams."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_stderr() -> Iterator[None]:
  """Drops what is written to this process's standard error.

  jax's CUDA plugin says four times that there is no driver, which is as meant here.
  """
  sys.stderr.flush()
  kept = os.dup(2)
  try:
    with open(os.devnull, "wb") as nowhere:
      os.dup2(nowhere.fileno(), 2)
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
