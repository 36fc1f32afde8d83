"""Debug mode: stops at the first operation whose result is not a number, and names its line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.experimental import checkify

import rtdmd_jax
from rtdmd_jax.errors import EXIT_NUMBERS, Stopped
from rtdmd_jax.runtime.compilation import jit


def checked_jit(function: Callable, *, check: bool, **options: Any) -> Callable:
  """`compilation.jit(function, **options)`, with every operation checked if asked for.

  Args:
    function: to be compiled.
    check: fail at the first NaN or division by zero, wherever it arises: losses, their parts,
      gradients. Takes about twice the time, and donates nothing.
    **options: of `jax.jit`.

  Raises:
    Stopped: (from the compiled function) with the operation and the line that called it.
  """
  if not check:
    return jit(function, **options)
  compiled: Any = jit(checkify.checkify(function, errors=checkify.float_checks))

  def checked(*args: Any) -> Any:
    error, out = compiled(*args)
    if (found := error.get_exception()) is not None:
      raise Stopped(f"train.check_numbers: {found} ({_line(found)})", EXIT_NUMBERS)
    return out

  run: Any = checked
  run.trace = compiled.trace
  return run


def _line(error: Any) -> str:
  """The innermost line of this package that called the failed operation."""
  for frame in error.traceback_info.frames:
    path = Path(frame.file_name)
    if path.is_relative_to(_PACKAGE):
      return f"{path.relative_to(_PACKAGE)}, line {frame.line_num}, {frame.function_name}"
  return "outside of this package"


_PACKAGE = Path(rtdmd_jax.__file__).parent
