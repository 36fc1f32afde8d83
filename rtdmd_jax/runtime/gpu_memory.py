"""The part of a GPU's memory that a run takes."""

import os

from rtdmd_jax.errors import UserError

# jax reads both, and refuses to start if both are set.
VARIABLE = "XLA_CLIENT_MEM_FRACTION"
_OLD_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
# jax's own default, 0.75, leaves 21 to 38 GB of a card unused. What this one leaves is for the CUDA
# context and NCCL's buffers.
_TRAINING = 0.92


def claim() -> None:
  """Gives programs of this process `fraction()` of a card; to be called before jax starts."""
  part = fraction()
  if not any(os.environ.get(name) for name in (VARIABLE, _OLD_VARIABLE)):
    os.environ[VARIABLE] = str(part)


def fraction() -> float:
  """Part of a card that is jax's pool in training.

  Raises:
    UserError: a variable is set to something else than a number in (0, 1].
  """
  for name in (VARIABLE, _OLD_VARIABLE):
    if text := os.environ.get(name):
      return _part(name, text)
  return _TRAINING


def _part(name: str, text: str) -> float:
  try:
    part = float(text)
  except ValueError:
    part = 0.0
  if not 0 < part <= 1:
    raise UserError(f"{name} is {text!r}; set a part of the card's memory, such as 0.92.")
  return part
