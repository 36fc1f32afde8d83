"""Callables that a configuration names by import path."""

import importlib
from collections.abc import Callable

from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.process import described


def imported(path: str) -> Callable:
  """The callable of `pkg.mod:Name`.

  Raises:
    UserError: there is no such module or name, its module fails, or it is not callable.
  """
  module, _, name = path.partition(":")
  try:
    target = getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError, ValueError) as error:
    hint = "write it as pkg.mod:Name, and name its folder in PYTHONPATH"
    raise UserError(f"cannot import {path!r} ({error}); {hint}") from error
  except (Exception, SystemExit) as error:  # what a module of others does when it is imported
    raise UserError(f"cannot import {path!r}: {described(error)}") from error
  if not callable(target):
    raise UserError(f"{path!r} is not callable; name a class or a function")
  return target
