"""Micro-batches: every row is in one of them, and none leaves its device."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.training.micro_batching import sorted_parts
from tests.support.paths import ROOT


def test_marked_rows_are_in_the_last_parts():
  last = jnp.array([1, 0, 0, 1, 0, 1, 1, 0], bool)
  rows = {"a": jnp.arange(8), "b": jnp.arange(16).reshape(8, 2)}
  parts = sorted_parts(last, 4, rows)
  np.testing.assert_array_equal(parts["a"], [[1, 2], [4, 7], [0, 3], [5, 6]])
  np.testing.assert_array_equal(parts["b"][..., 1], 2 * parts["a"] + 1)


@pytest.mark.slow
def test_rows_stay_on_their_devices():
  command = [sys.executable, "tests/support/sorted_parts_run.py"]
  found = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
  # Devices 0..3 hold two rows each; of device 1 both are marked, of the others the first.
  assert found["parts"] == [[1, 2, 5, 7], [0, 3, 4, 6]]
  assert found["collectives"] == []
