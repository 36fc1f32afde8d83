"""Configurations: Python files that return a locked `ConfigDict`, with typed overrides."""

import ast
import copy
import difflib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rtdmd_jax.errors import UserError

# Sections whose entries stand for themselves: a run without one of them is another whole run.
_REMOVABLE = ("rewards", "eval.rewards", "systems", "prompts")
# Keys of the release before this one, which reads them with a warning.
RENAMED = {
  "batch.repeats": "batch.images_per_prompt",
  "dmd.steps": "dmd.timesteps",
  "dmd.consistency.moves": "dmd.consistency.transitions",
  "policy.dm_weight": "policy.dmd_weight",
}
_SHIPPED = "rtdmd_jax:"
_ABSENT = object()
_LONGEST = 200  # letters of a value in a message
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def load_config(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
  """Load `path.py[:arg]`, apply `a.b=value` overrides in order and lock the result.

  The file defines `get_config()` or `get_config(arg)`. It runs with its own folder importable, as a
  script would, so that configurations can share code. `rtdmd_jax:name[:arg]` is a configuration
  that the package brings, wherever it is installed.

  Args:
    spec: path of the file, or `rtdmd_jax:` and the name of a shipped one, optionally followed by
      `:` and the argument of `get_config`.
    overrides: strings `dotted.key=value`; the value is read with the type of the key's default.

  Returns:
    A locked `ConfigDict`.

  Raises:
    UserError: the file is missing, broken or returns no `ConfigDict`; an override names an unknown
      key or has the wrong type.
  """
  path, arg = _split_spec(spec)
  get_config = _load_get_config(path)
  try:
    takes_arg = bool(inspect.signature(get_config).parameters)
  except ValueError:  # some callables that are not written in Python
    takes_arg = False
  if arg is not None and not takes_arg:
    raise UserError(
      f"{path}: get_config() takes no argument, but --config={spec} gives it {arg!r}; drop ':{arg}'"
    )
  try:
    config = get_config(arg) if arg is not None else get_config()
  except UserError:
    raise
  except (Exception, SystemExit) as error:
    raise _does_not_load(path, error) from error
  if not isinstance(config, ConfigDict):
    raise UserError(
      f"{path}: get_config must return a ml_collections.ConfigDict, not {type(config).__name__}"
    )
  _rename_keys(config, path)
  for override in overrides:
    apply_override(config, override)
  return config.lock()


def apply_override(config: ConfigDict, override: str) -> None:
  """Set one key of `config` in place from `dotted.key=value`.

  Booleans are `true`, `false`, `1` or `0`; tuples are written `1,2` or `(1, 2)` and keep the type
  of their elements; a key whose default is None takes any Python literal, or else the text itself.
  `none` removes an entry of the sections `rewards`, `eval.rewards`, `systems` and `prompts`.

  Raises:
    UserError: no `=`, an unknown key (the nearest name is given), a section, or the wrong type.
  """
  key, separator, text = override.partition("=")
  if not separator:
    raise UserError(f"--config.{override} has no value; write --config.{override}=VALUE")
  if text.lower() == "none" and _removed(config, key):
    return
  if key in RENAMED and _section(config, key) is None:
    _warn_renamed(f"--config.{key}", key)
    key = RENAMED[key]
  section = config
  *parents, name = key.split(".")
  for depth, parent in enumerate(parents):
    if parent not in section or not isinstance(section[parent], ConfigDict):
      raise _unknown_key(config, key, ".".join(parents[: depth + 1]))
    section = section[parent]
  if name not in section:
    raise _unknown_key(config, key, key)
  current = section[name]
  if isinstance(current, ConfigDict):
    keys = ", ".join(sorted(current)) or "(none)"
    removal = f", or remove it with --config.{key}=none" if _container(config, key) else ""
    raise UserError(f"--config.{key} is a section; set one of its keys: {keys}{removal}")
  value_type = section.get_type(name) if current is None else type(current)
  with section.unlocked():
    section[name] = _parse(key, text, current, value_type)


def with_current_names(tree: Mapping[str, Any]) -> dict[str, Any]:
  """A configuration that an earlier release stored, as nested dicts, with the keys of this one."""
  current = copy.deepcopy(dict(tree))
  for old, new in RENAMED.items():
    section = _section(current, old)
    if section is not None:
      section[new.rpartition(".")[2]] = section.pop(old.rpartition(".")[2])
  return current


def _rename_keys(config: ConfigDict, path: Path) -> None:
  """Gives keys of the earlier release, which a user's file has set, their new names."""
  for old, new in RENAMED.items():
    section = _section(config, old)
    if section is not None:
      _warn_renamed(f"{path}: {old}", old)
      with section.unlocked():
        section[new.rpartition(".")[2]] = section[old.rpartition(".")[2]]
        del section[old.rpartition(".")[2]]


def _warn_renamed(where: str, old: str) -> None:
  text = f"warning: {where} is called {RENAMED[old]} since this release; the next one refuses it"
  print(text, file=sys.stderr)


def _section(tree: Any, key: str) -> Any:
  """The section that holds the dotted key; None where the key is not set."""
  *parents, name = key.split(".")
  for parent in parents:
    tree = tree.get(parent) if isinstance(tree, ConfigDict | dict) else None
  return tree if isinstance(tree, ConfigDict | dict) and name in tree else None


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yield `(dotted.key, value)` of nested dicts, depth first in the order of the dicts."""
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from flatten(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def _container(config: ConfigDict, key: str) -> tuple[ConfigDict, str] | None:
  """The section of `_REMOVABLE` that `key` is an entry of, and the entry's name."""
  for prefix in _REMOVABLE:
    section = config
    for part in prefix.split("."):
      section = section.get(part) if isinstance(section, ConfigDict) else None
    name = key.removeprefix(f"{prefix}.")
    if isinstance(section, ConfigDict) and name != key and name in section:
      return section, name
  return None


def _removed(config: ConfigDict, key: str) -> bool:
  """Whether `key` was an entry that may be removed, and is now."""
  entry = _container(config, key)
  if entry is None:
    return False
  section, name = entry
  with section.unlocked():
    del section[name]
  return True


def shipped_configs() -> dict[str, Path]:
  """The files of the shipped configurations by name."""
  package = Path(__file__).resolve().parent
  # Inside the package where it is installed, beside it in a clone.
  folder = next(f for f in (package / "configs", package.parent / "configs") if f.is_dir())
  return {file.stem: file for file in sorted(folder.glob("*_*.py")) if file.stem[0] != "_"}


def _split_spec(spec: str) -> tuple[Path, str | None]:
  if spec.startswith(_SHIPPED):
    name, separator, arg = spec.removeprefix(_SHIPPED).partition(":")
    files = shipped_configs()
    if name not in files:
      nearest = difflib.get_close_matches(name, files, n=3) or list(files)
      raise UserError(
        f"--config={spec}: the package has no configuration {name!r}; it has {', '.join(nearest)}"
      )
    return files[name], arg if separator else None
  head, separator, arg = spec.partition(".py:")
  path = Path(head + ".py" if separator else spec)
  if path.suffix != ".py":
    raise UserError(
      f"--config={spec} must name a .py file or {_SHIPPED}NAME, optionally followed by ':ARGUMENT'"
    )
  if not path.is_file():
    nearest = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
    hint = f"; did you mean {path.parent / nearest[0]}?" if nearest else ""
    raise UserError(f"configuration file {path} does not exist{hint}")
  return path, arg if separator else None


def _load_get_config(path: Path):
  folder = str(path.resolve().parent)
  before = set(sys.modules)
  sys.path.insert(0, folder)
  try:
    module_spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None  # it is a .py file
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
  except UserError:
    raise
  except (Exception, SystemExit) as error:
    raise _does_not_load(path, error) from error
  finally:
    sys.path.remove(folder)
    # Siblings imported by this file must not shadow those of a configuration in another folder.
    for name in set(sys.modules) - before:
      if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == Path(folder):
        del sys.modules[name]
  if not callable(getattr(module, "get_config", None)):
    raise UserError(f"configuration file {path} defines no function get_config")
  return module.get_config


def _does_not_load(path: Path, error: BaseException) -> UserError:
  """Says where in the file the user's own code went wrong."""
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
  if isinstance(error, SyntaxError) and error.lineno:
    lines.append(error.lineno)
  line = f" line {lines[-1]}" if lines else ""
  said = str(error) or type(error).__name__
  known = isinstance(error, (SyntaxError, ImportError, NameError))
  kind = "" if known or not str(error) else f"{type(error).__name__}: "
  return UserError(f"configuration file {path}{line} does not load: {kind}{said}")


def _unknown_key(config: ConfigDict, key: str, unknown: str) -> UserError:
  names = [name for name, _ in flatten(config.to_dict())]
  nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
  if not nearest:  # the right name in the wrong section
    nearest = [name for name in names if name.split(".")[-1] == key.split(".")[-1]][:1]
  hint = f"did you mean {nearest[0]}?" if nearest else f"sections: {', '.join(sorted(config))}"
  return UserError(f"--config.{key}: the configuration has no key {unknown}; {hint}")


def _parse(key: str, text: str, current: Any, value_type: type) -> Any:
  """`text` as a value of the type of `current`."""
  if value_type is bool:
    if text.lower() not in _BOOLEANS:
      raise UserError(f"--config.{key}={text} must be true or false")
    return _BOOLEANS[text.lower()]
  if value_type in (int, float):
    try:
      return value_type(text)
    except ValueError:
      raise UserError(f"--config.{key}={text} must be {_NAMES[value_type]}") from None
  if value_type is str:
    return text
  if value_type in (tuple, list):
    return value_type(_parse_sequence(key, text, tuple(current or ())))
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return text


def _parse_sequence(key: str, text: str, current: tuple) -> tuple:
  stripped = text.strip().removeprefix("(").removesuffix(")").removeprefix("[").removesuffix("]")
  items = [item.strip().strip("'\"") for item in stripped.split(",") if item.strip()]
  if current and any(isinstance(value, (tuple, list, dict)) for value in current):
    raise UserError(f"--config.{key} holds nested values; change it in the configuration file")
  value_type = type(current[0]) if current else type(None)
  return tuple(_parse(key, item, None, value_type) for item in items)


_NAMES = {int: "a whole number", float: "a number"}


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


def _show(value: Any) -> str:
  if value is _ABSENT:
    return "absent"
  text = json.dumps(value)
  return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
