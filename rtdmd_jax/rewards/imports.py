"""Callables that a configuration names by import path."""

import importlib
from collections.abc import Callable

from rtdmd_jax.errors import UserError


def imported(path: str) -> Callable:
  """The callable of `pkg.mod:Name`.

  Raises:
    UserError: there is no such module or name, or it is not callable.
  """
  module, _, name = path.partition(":")
  try:
    found = getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError, ValueError) as error:
    raise UserError(f"cannot import {path!r} ({error}); write it as pkg.mod:Name") from error
  if not callable(found):
    raise UserError(f"{path!r} is not callable; name a class or a function")
  return found
