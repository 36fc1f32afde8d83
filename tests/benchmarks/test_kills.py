"""The yardsticks of benchmarks/kills.py: it must be able to see a difference and a kill."""

import subprocess
import sys

import numpy as np
import pytest

from benchmarks import kills


@pytest.mark.parametrize(
  "other",
  [
    {"a": np.float32([0.0, np.nan])},
    {"a": np.float32([-0.0, np.nan]), "b": np.int32(3)},
    {"a": np.float32([[0.0, np.nan]]), "b": np.int32(3)},
    {"a": np.float32([0.0, np.nan]), "b": np.uint32(3)},
  ],
)
def test_any_difference_of_bits_is_seen(other):
  one = {"a": np.float32([0.0, np.nan]), "b": np.int32(3)}
  assert kills.differing(one, dict(one)) == []
  assert len(kills.differing(one, other)) == 1
  assert len(kills.differing(other, one)) == 1


def run(program):
  return subprocess.Popen([sys.executable, "-c", program])


def test_a_kill_says_where_it_struck(tmp_path):
  for name in ("3", "12", "13.orbax-checkpoint-tmp"):
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
  kill = kills.kill_at(run("import time; time.sleep(60)"), tmp_path, 0.1, while_saving=True)
  assert kill == kills.Kill([3, 12], saving=True)


def test_a_run_that_ended_was_not_killed(tmp_path):
  assert kills.kill_at(run(""), tmp_path, 60, while_saving=False) is None
  assert kills.kill_at(run(""), tmp_path, 60, while_saving=True) is None


def test_a_run_that_failed_is_not_compared(tmp_path):
  (tmp_path / "output.txt").write_text("error: no prompts\n")
  with pytest.raises(RuntimeError, match="ended with 2:\nerror: no prompts"):
    kills.finish(run("raise SystemExit(2)"), tmp_path)
