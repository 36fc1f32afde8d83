"""The tool on the tiny pipeline, for TPUs that are not there."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.slow
tpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


def _run(*arguments, program=("-m", "rtdmd_jax.aot")):
  environment = {k: v for k, v in os.environ.items() if k != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
  return subprocess.run(
    [sys.executable, *program, *arguments],
    cwd=ROOT,
    env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )


@tpu
@pytest.mark.parametrize(
  "stage, topology, programs",
  [
    ("stage1", "v5e:2x2", ["fake_score", "generator", "finish"]),
    ("stage2", "v5e:1x1", ["rollout", "fake_score", "policy", "finish"]),
  ],
)
def test_the_tiny_run_fits(tmp_path, stage, topology, programs):
  out = tmp_path / "report.json"
  done = _run(f"--config=configs/tiny_{stage}.py", f"--topology={topology}", f"--json={out}")
  assert done.returncode == 0, done.stderr
  report = json.loads(out.read_text())
  assert [p["name"] for p in report["programs"]] == programs
  assert all(f"{name}: peak" in done.stderr for name in programs)
  assert report["fits"] and "everything fits" in done.stdout
  for program in report["programs"][:-1]:
    assert 0 < program["peak"] <= report["chip"]["hbm"]
    assert program["flops"] > 1e9 and program["memory"] > 1e6
    assert bool(program["sent"]) == (topology == "v5e:2x2")


@tpu
def test_offloaded_kernels_never_lie_on_the_device_as_a_stack():
  done = _run(program=("tests/support/offload_on_tpu.py",))
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  here, there = found["resident"], found["offloaded"]
  assert here["on_device"] > 0 and here["on_host"] == 0 and here["host_arguments"] == 0
  assert there["on_device"] == 0 and there["on_host"] > 0
  assert there["host_arguments"] >= found["kernels"]
  assert here["arguments"] - there["arguments"] >= found["kernels"]


@tpu
def test_a_batch_that_is_too_large_exits_with_1():
  done = _run(
    "--config=configs/tiny_stage1.py", "--topology=v5e:1x1", "--only=fake_score",
    "--config.batch.prompts=32768",
  )  # fmt: skip
  assert done.returncode == 1, done.stderr
  assert "DOES NOT FIT" in done.stdout


@tpu
@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--topology=v9z:2x2"], "--topology is 'v9z:2x2'"),
    (["--topology=h100:none"], "such as h100:8"),
    (["--topology=h100:2x8"], "such as h100:1x2x8"),
    (["--topology=v5e:2x2", "--config.batch.prompts=6"], "do not split over the 4 devices"),
    (["--topology=v5e:2x2", "--config.model.pretrained=x/unknown"], "no published checkpoint"),
    (["--topology=v5e:2x2", "--only=nothing"], "the programs are fake_score, generator, finish"),
  ],
)
def test_mistakes_exit_with_2(arguments, message):
  done = _run("--config=configs/tiny_stage1.py", *arguments)
  assert done.returncode == 2
  assert message in done.stderr.splitlines()[-1]


@tpu
def test_int8_kernels_stay_int8_until_their_block():
  done = _run(program=("tests/support/int8_on_tpu.py",))
  assert done.returncode == 0, done.stderr
  # No floats of a whole stack are kept, and devices send each other one byte a weight.
  assert json.loads(done.stdout) == {"stacks": ["s8"], "gathered": ["s8"]}
