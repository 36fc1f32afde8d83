import os
import socket
import subprocess
import sys

import pytest

from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime import distributed


def variables(coordinator=None, processes=None, process=None):
  values = {
    "RTDMD_COORDINATOR": coordinator,
    "RTDMD_PROCESSES": processes,
    "RTDMD_PROCESS": process,
  }
  return {name: value for name, value in values.items() if value is not None}


@pytest.mark.parametrize(
  "given, want",
  [
    (variables(), None),
    (variables("auto"), {}),
    (
      variables("10.0.0.1:1234", "4", "3"),
      {"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 3},
    ),
  ],
)
def test_arguments(given, want):
  assert distributed.arguments(given) == want


@pytest.mark.parametrize(
  "given, message",
  [
    (variables(processes="2"), "RTDMD_PROCESSES is set without RTDMD_COORDINATOR"),
    (variables("a:1"), "RTDMD_PROCESSES is not set"),
    (variables("a:1", "2"), "RTDMD_PROCESS is not set"),
    (variables("a:1", "two", "0"), "RTDMD_PROCESSES is two"),
    (variables("a:1", "2", "2"), "RTDMD_PROCESS is 2; it counts from 0"),
  ],
)
def test_mistakes(given, message):
  with pytest.raises(UserError, match=message):
    distributed.arguments(given)


def test_one_process_is_left_alone(monkeypatch):
  monkeypatch.delenv("RTDMD_COORDINATOR", raising=False)
  monkeypatch.setattr("jax.distributed.initialize", lambda **_: pytest.fail("must not be called"))
  distributed.initialize()


@pytest.mark.slow
def test_two_processes_find_each_other():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  code = (
    "from rtdmd_jax.runtime.distributed import initialize\ninitialize()\nimport jax\n"
    "print(jax.process_index(), jax.process_count(), jax.device_count())"
  )
  running = [
    subprocess.Popen(
      [sys.executable, "-c", code],
      env={
        **os.environ,
        **variables(address, "2", str(i)),
        "PYTHONPATH": os.pathsep.join(sys.path),
      },
      stdout=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  assert [p.communicate(timeout=120)[0].split() for p in running] == [
    ["0", "2", "2"],
    ["1", "2", "2"],
  ]
