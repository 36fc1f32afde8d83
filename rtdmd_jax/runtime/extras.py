"""The optional installs of pyproject.toml, and how to say that one is missing."""

import importlib.metadata
import shlex
import sys
from pathlib import Path

import rtdmd_jax
from rtdmd_jax.errors import UserError


def install_line(extra: str) -> str:
  """The command that installs an extra of pyproject.toml, such as "studio", for this Python.

  The package is on no registry: of a clone the line names the folder, else what the extra brings.
  """
  clone = Path(rtdmd_jax.__file__).parents[1]
  pip = f"{sys.executable} -m pip install"
  if (clone / "pyproject.toml").is_file():
    return f'{pip} -e "{clone}[{extra}]"'
  marks = (f"extra == '{extra}'", f'extra == "{extra}"')
  lines = importlib.metadata.requires("rtdmd_jax") or []
  brought = [line.partition(";")[0].strip() for line in lines if line.endswith(marks)]
  return f"{pip} {shlex.join(brought)}"


def missing(what: str, error: ImportError, extra: str, instead: str = "") -> UserError:
  """The mistake to raise where an import of an extra's package failed.

  Args:
    what: needs the package, such as "log.wandb".
    error: of the import.
    extra: of pyproject.toml.
    instead: what to do without it, after "or".
  """
  otherwise = f", or {instead}" if instead else ""
  name = error.name or "a package"
  return UserError(f"{what} needs {name} ({error}); run {install_line(extra)}{otherwise}")
