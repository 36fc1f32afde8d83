"""State dictionaries as they are published: safetensors or PyTorch files, bare or wrapped."""

import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which bfloat16 files need
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from rtdmd_jax.errors import UserError
from rtdmd_jax.weights.torch_file import load_torch

# Under which training programs keep the state dictionary beside other things.
_WRAPPER = "state_dict"


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads all tensors of a file.

  Args:
    path: a `.safetensors` file, or one that `torch.save` wrote (no code in it is run): a state
      dictionary, or a checkpoint that holds one as "state_dict".

  Raises:
    UserError: a missing or broken file, or something other than tensors by name.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(
      f"{path} is not a file; give a .safetensors, .pt, .pth or .bin file of weights."
    )
  if path.suffix == ".safetensors":
    try:
      return load_file(path)
    except (SafetensorError, OSError) as error:
      raise UserError(f"{path} is not a whole safetensors file ({error}).") from error
  tree = load_torch(path)
  if isinstance(tree, Mapping) and isinstance(tree.get(_WRAPPER), Mapping):
    tree = tree[_WRAPPER]
  if not isinstance(tree, Mapping) or not tree:
    raise UserError(f"{path} holds a {type(tree).__name__}, expected tensors by name.")
  for key, value in tree.items():
    if not isinstance(value, np.ndarray):
      raise UserError(f"{path} holds {key!r}, a {type(value).__name__}, among its tensors.")
  return dict(tree)
