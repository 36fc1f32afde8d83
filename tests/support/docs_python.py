"""The Python of the pages' examples: as they call it, with smaller sizes behind; see `docs_blocks`.

A service is ended as soon as it serves, and pip looks whether what it is to install exists.
"""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

SERVICE = "rtdmd_jax.rewards.serve"


def main(argv: list[str]) -> None:
  if argv[0] == "pip":
    sys.exit(pip(argv[1:]))
  if argv[:2] == ["-m", SERVICE]:
    sys.exit(serve([*argv, "--port=0"]))
  if argv[0] == "-c":
    os.execv(sys.executable, [sys.executable, *argv])
  sys.path.insert(0, str(Path(__file__).parents[2]))
  from tests.support.docs_blocks import appended

  os.execv(sys.executable, [sys.executable, *argv, *appended(argv)])


def serve(argv: list[str]) -> int:
  """The exit code of a service that was up and got SIGTERM."""
  process = subprocess.Popen([sys.executable, *argv], stdout=subprocess.PIPE, text=True)
  line = process.stdout.readline()
  if line.startswith("serving "):
    process.send_signal(signal.SIGTERM)
  process.communicate()
  return process.returncode


def pip(argv: list[str]) -> str | None:
  """What is wrong with an installation, or None."""
  extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
  if argv[0] != "install":
    return f"pip {argv[0]}?"
  for flag, target in zip(argv, argv[1:], strict=False):
    if flag == "-r" and not Path(target).is_file():
      return f"no file {target}"
    if flag == "-e":
      path, _, names = target.rstrip("]").partition("[")
      wrong = {name for name in names.split(",") if name} - set(extras)
      if wrong or not Path(path, "pyproject.toml").is_file():
        return f"nothing to install: {target} {wrong}"
  return None


if __name__ == "__main__":
  main(sys.argv[1:])
