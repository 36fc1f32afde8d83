"""The command `rtdmd`, and what its tools share: flags, one-sentence errors, exit codes.

Nothing here imports jax, so `--help` and mistakes on the command line are answered at once.
"""

import difflib
import errno
import inspect
import os
import runpy
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from rtdmd_jax.config import load_config
from rtdmd_jax.errors import EXIT_INTERRUPTED, EXIT_PIPE, EXIT_USER_ERROR, Stopped, UserError
from rtdmd_jax.runtime.extras import install_line

_OVERRIDE = "--config."
# What a disk answers is not a defect of the program. What to do about it, by its answer:
_DISK = {
  **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room"),
  **dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS), "give another path, or change its permissions"
  ),
  **dict.fromkeys(
    (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    "give another path",
  ),
}
# The module behind each subcommand of `rtdmd`, and what it does.
_COMMANDS = {
  "train": ("rtdmd_jax.main", "trains a stage, from its last checkpoint if it has one"),
  "check": ("rtdmd_jax.main", "says what would run and what is wrong, and trains nothing"),
  "sample": ("rtdmd_jax.sample", "draws images of prompts"),
  "evaluate": ("rtdmd_jax.evaluate", "draws and scores several systems, and compares them"),
  "export": ("rtdmd_jax.export", "exports adapters for diffusers, ComfyUI or merged"),
  "report": ("rtdmd_jax.report", "writes the report of a run as one HTML file"),
  "studio": ("rtdmd_jax.studio", "shows a page that draws with several systems"),
  "aot": ("rtdmd_jax.aot", "compiles a run for devices that are not there"),
  "serve": ("rtdmd_jax.rewards.serve", "serves rewards over HTTP"),
}
# What configurations are for, and the tools that take them first.
_PURPOSES = {
  "training": "rtdmd_jax.main",
  "pretraining": "rtdmd_jax.main",
  "images": "rtdmd_jax.sample",
  "evaluation": "rtdmd_jax.evaluate",
}


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

  def expect(self, *purposes: str) -> None:
    """Refuses a configuration that is for another tool.

    Args:
      purposes: those of "training", "pretraining", "images" and "evaluation" that the tool is for.

    Raises:
      UserError: the configuration is for another purpose; names the tool that takes it.
    """
    purpose = _purpose(self.config)
    if purpose is not None and purpose not in purposes:
      raise UserError(
        f"--config={self.flags.config} is for {purpose}: give it to python -m {_PURPOSES[purpose]};"
        f" this tool takes a configuration for {' or '.join(purposes)}"
      )


def run(
  main: Callable[[Invocation], None],
  argv: Sequence[str] | None = None,
  *,
  define_flags: Callable[[flags.FlagValues], None] | None = None,
  requires: Sequence[str] = (),
  shared: Sequence[str] = ("config", "workdir"),
  positional: bool = False,
) -> int:
  """Parse the command line, call `main` and return the exit code of the process.

  Use as `sys.exit(run(main, requires=("config", "workdir")))`. Keys of the configuration are
  overridden with `--config.section.key=value`.

  Args:
    main: the tool; its module's docstring is the text of `--help`.
    argv: the command line with the program's name first; `sys.argv` by default.
    define_flags: adds the tool's own flags to the flag values it is given.
    requires: names of flags that must be given.
    shared: which of the flags `config` and `workdir` the tool heeds; others are unknown to it.
    positional: whether the tool takes arguments without a flag.

  Returns:
    The exit code, see `guard`.
  """
  argv = list(sys.argv if argv is None else argv)
  values = flags.FlagValues()
  if "config" in shared:
    text = "Configuration: path.py or rtdmd_jax:NAME of a shipped one, either with :ARGUMENT."
    flags.DEFINE_string("config", None, text, values)
  if "workdir" in shared:
    flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, images.", values)
  if define_flags is not None:
    define_flags(values)

  def program() -> None:
    if {"-h", "-help", "--help"} & set(argv[1:]):
      print(_usage(main, values))
    else:
      main(_parse(argv, values, requires, positional))

  return guard(program)


def command() -> None:
  """The console command `rtdmd NAME ...`, which is `python -m MODULE ...`; ends the process."""
  name, *rest = [*sys.argv[1:], ""]
  if name in ("", "-h", "--help", "help"):
    print("The tools of rtdmd_jax. `rtdmd COMMAND --help` lists the flags of one.\n\nCommands:")
    for known, (_, about) in _COMMANDS.items():
      print(f"  {known:9s} {about}")
    sys.exit(0 if name else EXIT_USER_ERROR)
  if name not in _COMMANDS:
    nearest = difflib.get_close_matches(name, _COMMANDS, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(_COMMANDS)}"
    sys.exit(_mistake(f"rtdmd has no command {name!r}; {hint}"))
  sys.argv = [f"rtdmd {name}", *(["--check"] if name == "check" else []), *rest[:-1]]
  # As `python -m` does, the folder that the command is run in holds what a user imports.
  sys.path.insert(0, os.getcwd())
  runpy.run_module(_COMMANDS[name][0], run_name="__main__", alter_sys=False)


def guard(program: Callable[[], None]) -> int:
  """Calls `program` and returns the exit code of the process.

  Returns:
    0, or 2 after a `UserError`, for what the disk refuses, for a device that is not there and for a
    key that the configuration lacks (each printed as `error: ...`), or 130 after Ctrl-C, 141 when
    nobody reads the output any more, or the code of `Stopped`. Any other exception is a defect of
    the program and passes through with its traceback.
  """
  try:
    program()
    sys.stdout.flush()
  except UserError as error:
    return _mistake(str(error))
  except BrokenPipeError:
    # Python would try once more to write what is left, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return EXIT_PIPE
  except (OSError, RuntimeError, AssertionError, AttributeError, KeyError) as error:
    sentence = _of_the_disk(error) or _of_the_devices(error) or _of_the_config(error)
    if sentence is None:
      raise
    return _mistake(sentence)
  except Stopped as stopped:
    print(f"stopped: {stopped}", file=sys.stderr)
    return stopped.code
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return EXIT_INTERRUPTED
  return 0


def make_folder(path: str | Path, flag: str) -> Path:
  """Makes a folder for a tool's output, with its parents, unless it is there.

  Args:
    path: of the folder.
    flag: the flag or key that named it.

  Raises:
    UserError: no name, or it cannot be made, is a file or cannot be written to.
  """
  if path == "":
    raise UserError(f"{flag} is empty; name a folder")
  path = Path(path)
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"{flag} is {path}, where no folder can be made ({error.strerror}); give another path"
    ) from error
  if not os.access(path, os.W_OK | os.X_OK):
    raise UserError(
      f"{flag} is {path}, a folder that cannot be written to; give another one, or change its"
      " permissions"
    )
  return path


def _mistake(sentence: str) -> int:
  print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
  return EXIT_USER_ERROR


def _of_the_disk(error: Exception) -> str | None:
  """The sentence about a path that the file system refuses; None for other errors."""
  if not isinstance(error, OSError) or error.errno not in _DISK:
    return None
  name = error.filename2 or error.filename or "a file"
  return f"{name} cannot be written or read: {error.strerror}; {_DISK[error.errno]}"


def _of_the_devices(error: Exception) -> str | None:
  """Why jax has no device at all, if that is so: it raises an error of any kind then."""
  if not isinstance(error, RuntimeError | AssertionError) or "jax" not in sys.modules:
    return None
  import jax

  try:
    jax.devices()
  except (RuntimeError, AssertionError) as reason:
    asked = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
    why = str(reason).partition(" (set JAX_PLATFORMS")[0].partition("\n")[0]
    extra = "tpu" if "tpu" in asked else "gpu"
    return (
      f"JAX_PLATFORMS is {asked!r}, and jax finds no such device{f' ({why})' if why else ''}; unset"
      f" it, set it to cpu, or install what the device needs with {install_line(extra)}"
    )
  return None


def _of_the_config(error: Exception) -> str | None:
  """Which key was looked for in a configuration that does not have it."""
  frames = traceback.extract_tb(error.__traceback__)
  known = isinstance(error, AttributeError | KeyError) and frames
  if not known or "ml_collections" not in Path(frames[-1].filename).parts:
    return None
  key = str(error.args[0]).strip("'\"")
  return f"the configuration lacks the key {key!r}, which this tool reads; configs/ shows where"


def _purpose(config: ConfigDict | None) -> str | None:
  """The purpose of a configuration, a key of `_PURPOSES`; None where its keys do not tell."""
  if config is None:
    return None
  if config.get("stage") == "pretrain":
    return "pretraining"
  if "dmd" in config or "train" in config:
    return "training"
  if "systems" in config:
    return "evaluation"
  return "images" if "pipeline" in config else None


def _parse(
  argv: list[str], values: flags.FlagValues, requires: Sequence[str], positional: bool
) -> Invocation:
  overrides, rest = _split_overrides(argv)
  try:
    args = values(rest)[1:]
  except flags.Error as error:
    raise UserError(f"{error} (--help lists the flags)") from error
  if args and not positional:
    raise UserError(f"{args[0]!r} belongs to no flag (--help lists the flags)")
  for name in requires:
    if values[name].value in (None, ""):
      raise UserError(f"--{name} is required: {values[name].help}")
  spec, workdir = (values[n].value if n in values else None for n in ("config", "workdir"))
  if workdir == "":
    raise UserError("--workdir is empty; name a folder")
  if overrides and spec is None:
    raise UserError(f"--config.{overrides[0]} needs --config=FILE.py")
  return Invocation(
    config=None if spec is None else load_config(spec, overrides),
    workdir=None if workdir is None else Path(workdir),
    flags=values,
    args=tuple(args),
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
