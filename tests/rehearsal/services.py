"""The reward services that the configs name, by the project's own server.

Every port belongs to one config value, so the workers of one test session share the services: the
first starts them and the last ends them.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

from tests.rehearsal import layout
from tests.support.paths import ROOT

_PORTS = {"geneval": 18085, "geneval2": 18086, "hpsv3": 18087}
_START_SECONDS = 180


@contextlib.contextmanager
def running(folder):
  """Keeps the services up; `folder` is shared by all workers of a session."""
  state = folder / "services.json"
  with _locked(folder):
    known = json.loads(state.read_text()) if state.exists() else {"users": 0}
    if not known["users"]:
      known["pids"] = _start(folder)
    known["users"] += 1
    state.write_text(json.dumps(known))
  try:
    yield
  finally:
    with _locked(folder):
      known = json.loads(state.read_text())
      known["users"] -= 1
      state.write_text(json.dumps(known))
      for pid in [] if known["users"] else known["pids"]:
        with contextlib.suppress(ProcessLookupError):
          os.kill(pid, signal.SIGTERM)


@contextlib.contextmanager
def _locked(folder):
  with open(folder / "services.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def _start(folder):
  judges = folder / "judges"
  options = layout.write_judges(judges)
  processes = {name: _serve(folder, name, options[name], _PORTS[name]) for name in options}
  end = time.monotonic() + _START_SECONDS
  for name, process in processes.items():
    while not _answers(_PORTS[name]):
      if process.poll() is not None or time.monotonic() > end:
        said = (folder / f"{name}.log").read_text()[-2000:]
        raise RuntimeError(f"the service of {name} did not start:\n{said}")
      time.sleep(0.5)
  return [process.pid for process in processes.values()]


def _serve(folder, name, options, port):
  flags = [f"--option={name}.{key}={value}" for key, value in options.items()]
  # The package hpsv3 needs an old transformers: a stand-in of its interface is served in its place.
  path = [str(ROOT), str(ROOT / "tests/rehearsal/stand_ins")]
  with open(folder / f"{name}.log", "w") as log:
    return subprocess.Popen(
      [sys.executable, "-m", "rtdmd_jax.rewards.serve", f"--rewards={name}", f"--port={port}"]
      + flags,
      env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
      stdout=log,
      stderr=subprocess.STDOUT,
    )


def _answers(port):
  try:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
      return True
  except OSError:
    return False
