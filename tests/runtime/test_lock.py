"""One run at a time in a workdir, and what a dead one leaves is taken over."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime import lock
from rtdmd_jax.runtime.lock import WorkdirLock
from tests.support.paths import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from rtdmd_jax.runtime.lock import WorkdirLock
with WorkdirLock(Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(60)
"""


def holder(folder):
  """Another process that holds the lock."""
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  process = subprocess.Popen(
    [sys.executable, "-c", HOLDER, str(folder)],
    env=environment,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "held\n"
  return process


def test_it_is_there_as_long_as_the_run_and_says_who(tmp_path):
  work = tmp_path / "a/b"
  with WorkdirLock(work):
    said = json.loads((work / "run.lock").read_text())
    assert said["pid"] == os.getpid() and said["host"] and said["started"].endswith("UTC")
    with pytest.raises(UserError, match=f"another run is using .*process {os.getpid()} on "):
      WorkdirLock(work).__enter__()
    assert (work / "run.lock").exists()
  assert list(work.iterdir()) == []


def test_of_two_processes_one_is_refused_and_a_killed_one_is_forgotten(tmp_path):
  process = holder(tmp_path)
  with pytest.raises(UserError, match=f"process {process.pid} on .*; wait for it or stop it"):
    WorkdirLock(tmp_path).__enter__()
  process.send_signal(signal.SIGKILL)
  time.sleep(0.2)
  # Nobody has waited for it, so its pid is still taken.
  with WorkdirLock(tmp_path):
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
  process.wait()
  assert list(tmp_path.iterdir()) == []


def test_a_pid_that_is_used_again_holds_nothing(tmp_path):
  old = lock._here() | {"pid_start": "1", "token": "x"}
  (tmp_path / "run.lock").write_text(json.dumps(old))
  with WorkdirLock(tmp_path):
    pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": "elsewhere", "pid": 1, "token": "x"}'])
def test_out_of_sight_a_heartbeat_decides(tmp_path, text):
  file = tmp_path / "run.lock"
  file.write_text(text)
  with WorkdirLock(tmp_path, beat=0.02, patience=0.1):
    assert json.loads(file.read_text())["pid"] == os.getpid()
  file.write_text(text)

  def beats():
    for beat in range(200):
      time.sleep(0.01)
      file.write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "x", "beat": beat}))

  thread = threading.Thread(target=beats)
  thread.start()
  try:
    with pytest.raises(UserError, match="on elsewhere|on None"):
      WorkdirLock(tmp_path, beat=0.1, patience=5.0).__enter__()
  finally:
    thread.join()


def test_the_heartbeat_moves_and_spares_a_successor(tmp_path):
  file = tmp_path / "run.lock"
  with WorkdirLock(tmp_path, beat=0.01):
    time.sleep(0.2)
    assert json.loads(file.read_text())["beat"] > 0
    file.write_text('{"token": "successor"}')
    time.sleep(0.1)
    assert file.read_text() == '{"token": "successor"}'
  assert file.exists()


@pytest.mark.parametrize("kind", ["a file", "below a file"])
def test_a_workdir_that_cannot_be_made(tmp_path, kind):
  (tmp_path / "x").write_text("")
  work = tmp_path / "x" if kind == "a file" else tmp_path / "x/y"
  with pytest.raises(UserError, match="--workdir=.* cannot be used "):
    WorkdirLock(work).__enter__()
