"""Parses command lines of Python as the programs that they call do, and runs none of them.

Reads a JSON list of command lines (without `python`) from standard input; prints, as JSON, what is
wrong with them.
"""

import argparse
import contextlib
import io
import json
import os
import runpy
import sys
from pathlib import Path

from rtdmd_jax import cli
from rtdmd_jax.config import load_config

# Programs without arguments, which would run at once, and packages that not everyone has.
_WITHOUT = ("benchmarks/tilt/figures.py", "tests/support/offload_on_tpu.py")
_ABSENT = ("matplotlib", "torch", "diffusers")


class Parsed(Exception):
  """A program has read its command line."""


def stop_after_parsing() -> None:
  """Makes tools do nothing, and other programs end when argparse has read the command line."""
  run = cli.run
  cli.run = lambda main, *args, **how: run(lambda call: None, *args, **how)
  depth = []

  def stopping(method):
    def parse(self, *args, **how):
      if depth:  # of its own methods
        return method(self, *args, **how)
      depth.append(self)
      try:
        found = method(self, *args, **how)
      finally:
        depth.pop()
      check_config(*(found if isinstance(found, tuple) else (found, [])))
      raise Parsed

    return parse

  for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
    method = getattr(argparse.ArgumentParser, name)
    setattr(argparse.ArgumentParser, name, stopping(method))


def check_config(options: argparse.Namespace, rest: list[str]) -> None:
  """Loads the configuration that a benchmark names, with the keys that it is given."""
  given = vars(options)
  overrides = [*given.get("overrides", []), *(word.removeprefix("--config.") for word in rest)]
  for spec in [given["config"]] if given.get("config") else given.get("configs", []):
    load_config(str(spec), [*overrides, *given.get("set", [])])


def problem(argv: list[str]) -> str | None:
  """What is wrong with a command line, None if nothing is."""
  module = argv[0] == "-m"
  name, words = (argv[1], argv[2:]) if module else (argv[0], argv[1:])
  if name == "pytest" or (not module and "/" not in name):
    return None  # the latter is a file of the page itself
  path = f"{name.replace('.', '/')}.py" if module else name
  if path in _WITHOUT:
    return f"{path} takes no arguments" if words or not Path(path).is_file() else None
  said = io.StringIO()
  sys.argv = [name, *words]
  try:
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
      if module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
      else:
        runpy.run_path(path, run_name="__main__")
  except Parsed:
    return None
  except SystemExit as stopped:
    return said.getvalue() or str(stopped.code) if stopped.code else None
  except ModuleNotFoundError as error:
    return None if error.name in _ABSENT else str(error)
  except Exception as error:
    return f"{type(error).__name__}: {error}"
  return f"{name} has read no command line"


if __name__ == "__main__":
  os.environ["JAX_PLATFORMS"] = "cpu"
  sys.path.insert(0, os.getcwd())
  stop_after_parsing()
  found = [(argv, problem(argv)) for argv in json.load(sys.stdin)]
  print(json.dumps([pair for pair in found if pair[1]]))
