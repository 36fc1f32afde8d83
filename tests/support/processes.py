"""Starts the processes of one run on this machine, joined over its loopback."""

import os
import socket
import subprocess
import sys

from tests.support.paths import ROOT
from tests.support.xla_flags import xla_flags


def start(commands, folder, devices):
  """Python processes with these arguments and so many simulated devices each.

  Their programs are compiled quickly, and kept for a second start: in `folder`, if nothing else is
  said.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  joined = {"RTDMD_COORDINATOR": address, "RTDMD_PROCESSES": str(len(commands))}
  environment = (
    {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    | os.environ
    | {
      "PYTHONPATH": str(ROOT),
      "XLA_FLAGS": xla_flags(devices),
      "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
  )
  return [
    subprocess.Popen(
      [sys.executable, *map(str, command)],
      cwd=ROOT,
      env=environment | (joined | {"RTDMD_PROCESS": str(i)} if len(commands) > 1 else {}),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i, command in enumerate(commands)
  ]


def finish(running, timeout=900):
  """(exit code, stdout, stderr) of each; none outlives this call."""
  try:
    said = [process.communicate(timeout=timeout) for process in running]
  finally:
    for process in running:
      process.kill()
  return [(process.returncode, *texts) for process, texts in zip(running, said, strict=True)]
