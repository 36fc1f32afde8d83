"""The console command in a process of its own."""

import subprocess
import sys

from tests.support.paths import ROOT

CODE = "from rtdmd_jax.cli import command; command()"


def rtdmd(*arguments, cwd=ROOT, path=ROOT):
  """Runs `rtdmd ARGUMENTS` with the package in the folder `path`; the finished process."""
  return subprocess.run(
    [sys.executable, "-c", CODE, *map(str, arguments)],
    cwd=cwd,
    env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(path), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
