"""PyTorch, where it is installed."""

from pathlib import Path
from types import ModuleType

from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime.extras import missing


def require_torch(reward: str) -> ModuleType:
  """The module torch.

  Raises:
    UserError: it is not installed.
  """
  try:
    import torch
  except ImportError as error:
    instead = "let another machine serve the reward and give its url"
    raise missing(f"reward {reward!r}", error, "judges", instead) from error
  return torch


def pretrained(reward: str, cls: type, directory: str, device: str, **options: object):
  """`cls.from_pretrained` of a local folder, frozen, on `device`.

  Raises:
    UserError: no such folder, a broken one, or no such device.
  """
  if not Path(directory).is_dir():
    raise UserError(f"reward {reward!r}: {directory} is no folder; give a downloaded checkpoint")
  try:
    model = cls.from_pretrained(directory, local_files_only=True, **options)
    return model.eval().requires_grad_(False).to(device)
  except (OSError, ValueError, RuntimeError, AssertionError) as error:
    raise UserError(f"reward {reward!r}: cannot load {directory} on {device}: {error}") from error
