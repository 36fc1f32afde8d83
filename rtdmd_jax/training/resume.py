"""Checks that a run which goes on from a checkpoint is still the same run."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from rtdmd_jax.config import config_diff, with_current_names
from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime.checkpoint import Checkpoints
from rtdmd_jax.runtime.files import replace_text
from rtdmd_jax.runtime.json_text import parse_json
from rtdmd_jax.training.state import TrainState

# A resumed run must agree with itself in these sections and keys.
FIXED = (
  *("stage", "seed", "lora", "load", "data.prompts", "data.held_out", "dmd", "policy", "rewards"),
  # Not batch.micro_batches, model.remat and model.attention, which only save memory.
  *("batch.prompts", "batch.images_per_prompt", "train.fake_update_ratio"),
  *(f"model.{key}" for key in ("pretrained", "image_size", "dtype", "base_storage")),
  *(f"model.{role}_init" for role in ("generator", "fake_score", "teacher")),
)
_SHOWN = 6  # changes of a message


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
    UserError: a fixed key changed; the first of these changes are listed.
  """
  changes = config_diff(old, new)
  refused = [
    line for line in changes if any(f"{line.partition(':')[0]}.".startswith(f"{f}.") for f in fixed)
  ]
  if refused and not allow:
    more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
    raise UserError(
      f"cannot resume {name} with another objective or model "
      f"({'; '.join(refused[:_SHOWN])}{more}); restore these keys, start in a new "
      "workdir, or give --allow_config_change if you mean it"
    )
  return changes


def check_content(
  name: str,
  old: dict[str, str],
  new: dict[str, str],
  changed: Sequence[str] = (),
  *,
  allow: bool = False,
) -> list[str]:
  """Compare fingerprints of what a run reads; as `check_resume`.

  Args:
    name: of the checkpoint, for messages.
    old: fingerprints that it was written with, by a key of the configuration with or without a
      part after a comma (`training.fingerprints`). What only one side knows is not compared.
    new: those of this start.
    changed: lines of `config_diff`, whose keys name something else by now and were judged there.
    allow: let the content change all the same.

  Returns:
    A line for each change.

  Raises:
    UserError: something under the same path has another content.
  """
  elsewhere = {line.partition(":")[0] for line in changed}
  other = [
    key
    for key in sorted(old.keys() & new.keys())
    if old[key] != new[key] and key.partition(",")[0] not in elsewhere
  ]
  if other and not allow:
    raise UserError(
      f"cannot resume {name}: the content of {'; '.join(other)} has changed under the same path;"
      " restore it, start in a new workdir, or give --allow_config_change if you mean it"
    )
  return [f"the content of {key}" for key in other]


def check_start(
  saved: Checkpoints, workdir: Path, record: dict[str, Any], *, allow: bool = False
) -> None:
  """Before anything is loaded: may the newest checkpoint go on with these settings and files?

  Prints the changes that it permits.

  Args:
    saved: the checkpoints of the run, one at least.
    workdir: of the run.
    record: `config`, and fingerprints of the `files` that it names, as the checkpoints keep them.
    allow: permit all changes.

  Raises:
    UserError: as `check_resume` and `check_content`.
  """
  old = saved.read_extra()
  # Checkpoints of earlier versions carry nothing; their configuration lies beside them.
  stored = old["config"] if "config" in old else read_stored_config(workdir / "config.json")
  stored = with_current_names(stored)
  name = f"{workdir / 'checkpoints' / str(saved.latest_step)}"
  lines = check_resume(name, stored, record["config"], FIXED, allow=allow)
  lines += check_content(name, old.get("files", {}), record["files"], lines, allow=allow)
  for line in lines:
    print(f"changed since the last start: {line}")
  for line in config_diff(old.get("versions", {}), versions()):
    print(f"changed since the last start, results may differ in the last bits: {line}")


def restore(
  saved: Checkpoints, state: TrainState, record: dict[str, Any], *, allow: bool = False
) -> TrainState:
  """The newest checkpoint's state, in the place of `state`, on the frozen weights of `record`.

  `record` gets what the run has counted up to there (`NonFiniteGuard.counts`).

  Raises:
    UserError: a broken checkpoint, or as `check_content`.
  """
  state, old = saved.restore(state)
  name, weights = f"step {state.step}", old.get("weights", {})
  for line in check_content(name, weights, record["weights"], allow=allow):
    print(f"changed since the last start: {line}")
  print(f"resuming after step {int(state.step)}")
  record["updates"] = old.get("updates", {})
  return state


def read_stored_config(path: Path) -> dict[str, Any]:
  """The configuration that `store_config` wrote.

  Raises:
    UserError: the file is missing or broken.
  """
  try:
    text = path.read_bytes()
  except OSError as error:
    raise UserError(f"cannot resume: {path} cannot be read ({error.strerror})") from error
  stored = parse_json(text, f"cannot resume: {path}")
  if not isinstance(stored, dict):
    raise UserError(f"cannot resume: {path} holds no JSON object, so no configuration")
  return stored


def store_config(path: Path, config: dict[str, Any]) -> None:
  """Write `config` as JSON, replacing `path` in one step."""
  replace_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def versions() -> dict[str, str]:
  """Versions of what a result may depend on."""
  names = ("rtdmd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
  known = {}
  for name in names:
    try:
      known[name] = version(name)
    except ImportError:
      from rtdmd_jax import __version__

      known[name] = __version__
  device = jax.devices()[0]
  return known | {"python": platform.python_version(), "device": device.device_kind}
