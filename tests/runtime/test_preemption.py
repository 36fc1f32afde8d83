"""Signals become `Stopped`, and the time they leave is bounded."""

import os
import signal
import subprocess
import sys
import time

import pytest

from rtdmd_jax.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_UNSAVED, Stopped
from rtdmd_jax.runtime.preemption import Preemption
from tests.support.paths import ROOT

CODES = [(signal.SIGTERM, EXIT_PREEMPTED), (signal.SIGINT, EXIT_INTERRUPTED)]


@pytest.mark.parametrize("number, code", CODES)
def test_outside_of_steps_a_signal_stops_at_once(number, code):
  before = signal.getsignal(number)
  with pytest.raises(Stopped, match=f"stopped by {number.name}") as stopped:
    with Preemption(60):
      os.kill(os.getpid(), number)
      time.sleep(5)
  assert stopped.value.code == code
  assert signal.getsignal(number) is before


@pytest.mark.parametrize("number, code", CODES)
def test_inside_the_caller_finishes_and_leaves(number, code):
  with pytest.raises(Stopped, match="checkpoint 3 is saved") as stopped:
    with Preemption(60) as stop, stop.deferred():
      assert not stop.requested
      os.kill(os.getpid(), number)
      time.sleep(0.01)
      assert stop.requested
      stop.stop("checkpoint 3 is saved")
  assert stopped.value.code == code


def test_a_signal_during_the_last_step_is_not_lost():
  with pytest.raises(Stopped) as stopped:
    with Preemption(60) as stop, stop.deferred():
      os.kill(os.getpid(), signal.SIGTERM)
  assert stopped.value.code == EXIT_PREEMPTED


def test_a_second_signal_does_not_wait():
  with pytest.raises(Stopped, match="not saved again") as stopped:
    with Preemption(60) as stop, stop.deferred():
      os.kill(os.getpid(), signal.SIGINT)
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(5)
  assert stopped.value.code == EXIT_UNSAVED


def test_without_a_signal_nothing_happens():
  with Preemption(60) as stop, stop.deferred():
    pass
  assert not stop.requested


HANGS = """
import time
from rtdmd_jax.runtime.preemption import Preemption
with Preemption(0.5) as stop, stop.deferred():
  print("ready", flush=True)
  while True:
    time.sleep(0.1)
"""


def test_what_hangs_is_ended_after_the_grace_period():
  root = str(ROOT)
  process = subprocess.Popen(
    [sys.executable, "-c", HANGS],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"PYTHONPATH": root},
  )
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=20)
  assert process.returncode == EXIT_UNSAVED
  assert errors == "stopped by SIGTERM; not saved within 0.5 s\n"
