"""What a run must agree with itself in when it goes on from a checkpoint."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from rtdmd_jax.config import flatten
from rtdmd_jax.errors import UserError

_ABSENT = object()


def config_diff(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """Changed keys of two nested dicts as sorted lines `a.b: old -> new`.

  Values are compared as JSON, so a tuple equals the same list. A key of one side only is `absent`
  on the other.
  """
  old_values, new_values = (dict(flatten(json.loads(json.dumps(tree)))) for tree in (old, new))
  lines = []
  for key in sorted(old_values | new_values):
    before, after = old_values.get(key, _ABSENT), new_values.get(key, _ABSENT)
    if before != after:
      lines.append(f"{key}: {_show(before)} -> {_show(after)}")
  return lines


def check_resume(
  name: str,
  old: dict[str, Any],
  new: dict[str, Any],
  fixed: Sequence[str],
  *,
  allow: bool = False,
) -> list[str]:
  """Compare the configuration of a checkpoint with the one to resume it with.

  Args:
    name: of the checkpoint, for messages.
    old: the configuration it was written with.
    new: the new configuration as nested dicts.
    fixed: sections or keys (`"lora"`, `"lora.rank"`) that define the run's objective, backbone or
      adapter shapes and therefore must not change.
    allow: let them change all the same.

  Returns:
    Lines of `config_diff` for the permitted changes.

  Raises:
    UserError: a fixed key changed; all such changes are listed.
  """
  changes = config_diff(old, new)
  refused = [
    line for line in changes if any(f"{line.partition(':')[0]}.".startswith(f"{f}.") for f in fixed)
  ]
  if refused and not allow:
    raise UserError(
      f"cannot resume {name} with another objective or model ({'; '.join(refused)}); restore these "
      "keys, start in a new workdir, or give --allow_config_change if you mean it"
    )
  return changes


def check_weights(
  name: str, old: dict[str, str], new: dict[str, str], *, allow: bool = False
) -> list[str]:
  """Compare fingerprints of the frozen weights below the adapters; as `check_resume`."""
  changes = config_diff(old, new)
  if changes and not allow:
    raise UserError(
      f"cannot resume {name} on other frozen weights ({'; '.join(changes)}), although they have"
      " the same paths; restore the files, or give --allow_config_change if you mean it"
    )
  return changes


def read_stored_config(path: Path) -> dict[str, Any]:
  """What `store_config` wrote.

  Raises:
    UserError: the file is missing or broken.
  """
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UserError(f"cannot resume: {path} is missing or not JSON ({error})") from error


def store_config(path: Path, config: dict[str, Any]) -> None:
  """Write `config` as JSON, replacing `path` in one step."""
  temporary = path.with_suffix(".tmp")
  temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
  temporary.replace(path)


def _show(value: Any) -> str:
  return "absent" if value is _ABSENT else json.dumps(value)


def versions() -> dict[str, str]:
  """Versions of what a result may depend on."""
  names = ("rtdmd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
  found = {}
  for name in names:
    try:
      found[name] = version(name)
    except ImportError:
      from rtdmd_jax import __version__

      found[name] = __version__
  device = jax.devices()[0]
  return found | {"python": platform.python_version(), "device": device.device_kind}
