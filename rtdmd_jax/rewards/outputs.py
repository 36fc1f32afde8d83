"""Checks of the values that a reward returns."""

from collections.abc import Mapping

import numpy as np

# Kinds of numpy's types that are numbers, or objects that may be (None is NaN).
_KINDS = "biufO"


def checked_outputs(name: str, result: object, count: int) -> dict[str, np.ndarray]:
  """A reward's outputs [count] float32 by name.

  Args:
    name: of the reward.
    result: what it returned, its own scores or a mapping with them and others.
    count: number of images.

  Raises:
    ValueError: its own name is not among them, or something is not an array [count] of numbers.
  """
  outputs = dict(result) if isinstance(result, Mapping) else {name: result}
  if name not in outputs:
    names = ", ".join(map(repr, outputs)) or "nothing"
    raise ValueError(f"reward {name!r} returns {names} without its own name")
  return {str(key): _scores(name, str(key), values, count) for key, values in outputs.items()}


def _scores(name: str, key: str, values: object, count: int) -> np.ndarray:
  kind = type(values).__name__
  try:
    array = np.asarray(values)
    if array.dtype.kind not in _KINDS:
      raise TypeError(f"it holds {array.dtype}")
    with np.errstate(over="ignore"):  # what float32 cannot hold is no score
      array = array.astype(np.float32)
  except Exception as error:  # arrays of others may raise anything
    text = " ".join(str(error).split())[:200]
    raise ValueError(
      f"reward {name!r}: {key!r} is {kind}, not an array [{count}] of numbers ({text})"
    ) from error
  if array.shape != (count,):
    raise ValueError(
      f"reward {name!r}: {key!r} has shape {array.shape}, not [{count}] (it is {kind})"
    )
  return array
