"""What every command-line tool shares: flags, one-sentence errors and exit codes.

Nothing here imports jax, so `--help` and mistakes on the command line are answered at once.
"""

import errno
import inspect
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from rtdmd_jax.config import load_config
from rtdmd_jax.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, Stopped, UserError

_OVERRIDE = "--config."
# A disk that takes nothing more is not a defect of the program.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Invocation:
  """One parsed command line.

  Attributes:
    config: the locked configuration of `--config`, None when the flag was not given.
    workdir: the path of `--workdir`, None when the flag was not given.
    flags: values of the tool's own flags, as attributes.
    args: positional arguments.
  """

  config: ConfigDict | None
  workdir: Path | None
  flags: flags.FlagValues
  args: tuple[str, ...]


def run(
  main: Callable[[Invocation], None],
  argv: Sequence[str] | None = None,
  *,
  define_flags: Callable[[flags.FlagValues], None] | None = None,
  requires: Sequence[str] = (),
) -> int:
  """Parse the command line, call `main` and return the exit code of the process.

  Use as `sys.exit(run(main, requires=("config", "workdir")))`. Keys of the configuration are
  overridden with `--config.section.key=value`.

  Args:
    main: the tool; its module's docstring is the text of `--help`.
    argv: the command line with the program's name first; `sys.argv` by default.
    define_flags: adds the tool's own flags to the flag values it is given.
    requires: names of flags that must be given.

  Returns:
    0, or 2 after a `UserError` or on a full disk (printed as `error: ...`), or 130 after Ctrl-C, or
    the code of `Stopped`. Any other exception is a defect of the program and passes through with
    its traceback.
  """
  argv = list(sys.argv if argv is None else argv)
  values = flags.FlagValues()
  flags.DEFINE_string("config", None, "Configuration: path.py or path.py:argument.", values)
  flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, images.", values)
  if define_flags is not None:
    define_flags(values)
  if {"-h", "-help", "--help"} & set(argv[1:]):
    print(_usage(main, values))
    return 0
  try:
    main(_parse(argv, values, requires))
  except UserError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return EXIT_USER_ERROR
  except OSError as error:
    if error.errno not in _NO_ROOM:
      raise
    print(
      f"error: {error.filename or 'a file'} cannot be written: {error.strerror}; make room",
      file=sys.stderr,
    )
    return EXIT_USER_ERROR
  except Stopped as stopped:
    print(f"stopped: {stopped}", file=sys.stderr)
    return stopped.code
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return EXIT_INTERRUPTED
  return 0


def _parse(argv: list[str], values: flags.FlagValues, requires: Sequence[str]) -> Invocation:
  overrides, rest = _split_overrides(argv)
  try:
    positional = values(rest)[1:]
  except flags.Error as error:
    raise UserError(f"{error} (--help lists the flags)") from error
  for name in requires:
    if values[name].value is None:
      raise UserError(f"--{name} is required: {values[name].help}")
  if overrides and values.config is None:
    raise UserError(f"--config.{overrides[0]} needs --config=FILE.py")
  return Invocation(
    config=None if values.config is None else load_config(values.config, overrides),
    workdir=None if values.workdir is None else Path(values.workdir),
    flags=values,
    args=tuple(positional),
  )


def _split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
  """Take `--config.key=value` and `--config.key value` out of the command line."""
  overrides, rest = [], []
  words = iter(argv)
  for word in words:
    if word == "--":
      rest += [word, *words]
    elif word.startswith(_OVERRIDE):
      override = word.removeprefix(_OVERRIDE)
      if "=" not in override:
        value = next(words, None)
        override = override if value is None else f"{override}={value}"
      overrides.append(override)
    else:
      rest.append(word)
  return overrides, rest


def _usage(main: Callable[[Invocation], None], values: flags.FlagValues) -> str:
  lines = [inspect.cleandoc(main.__globals__.get("__doc__") or ""), "", "Flags:"]
  for name in sorted(values):
    flag = values[name]
    default = "" if flag.default is None else f" (default: {flag.default_as_str})"
    text = f"--{name}: {flag.help}{default}"
    lines += textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="      ")
    if name == "config":
      lines.append("  --config.KEY=VALUE: Overrides one key of the configuration.")
  return "\n".join(lines)
