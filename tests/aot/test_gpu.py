"""GPUs' compiler without a GPU; needs jax's CUDA plugin (`pip install -e ".[gpu-aot]"`)."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rtdmd_jax.aot.hlo import traffic
from rtdmd_jax.aot.topology import find_topology
from rtdmd_jax.config import load_config
from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime import gpu_memory
from tests.support.paths import ROOT

plugins = [f"jax_plugins.xla_cuda{version}" for version in (12, 13)]
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or not any(importlib.util.find_spec(name) for name in plugins),
    reason="needs jax's CUDA plugin",
  ),
]


@pytest.mark.parametrize("name, kind", [("a100:1", "A100"), ("h100:1", "H100"), ("h200:1", "H200")])
def test_attention_is_cudnns_and_products_are_cublas(name, kind):
  """A product and an attention with their gradients, compiled to the end."""
  there = find_topology(name)
  assert kind in there.kind and there.gpu and len(there.devices) == 1
  one = NamedSharding(Mesh(np.array(there.devices), ("x",)), PartitionSpec())
  x = jax.ShapeDtypeStruct((2, 129, 4, 64), jnp.bfloat16, sharding=one)
  kernel = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16, sharding=one)

  def loss(x, kernel):
    y = jnp.pad(x @ kernel, ((0, 0), (0, 1), (0, 0), (0, 0)))
    lengths = jnp.full((2,), 129, jnp.int32)
    out = jax.nn.dot_product_attention(
      y, y, y, implementation="cudnn", key_value_seq_lengths=lengths
    )
    return jnp.square(out.astype(jnp.float32)).sum()

  lowered = jax.jit(jax.grad(loss, (0, 1))).trace(x, kernel).lower()
  compiled = lowered.compile(dict(there.options))
  kernels = traffic(compiled.as_text()).kernels
  assert kernels["cuDNN attention"] == kernels["cuDNN attention backward"] == 1
  assert kernels["cuBLAS"] == 3
  assert compiled.memory_analysis().temp_size_in_bytes < 16e6


def test_offloaded_kernels_are_refused():
  config = load_config("rtdmd_jax:tiny_stage1", ["model.offload=true"])
  with pytest.raises(UserError, match="model.offload is True; GPUs' compiler"):
    find_topology("h100:1").check(config)


def test_the_report_of_a_run(tmp_path):
  """A program of the tiny pipeline over two H100, from the command line."""
  out = tmp_path / "report.json"
  command = ["--config=configs/tiny_stage1.py", "--topology=h100:2", "--only=fake_score"]
  done = subprocess.run(
    [sys.executable, "-m", "rtdmd_jax.aot", *command, f"--json={out}"],
    cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), gpu_memory.VARIABLE: ""},
    capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert done.stderr.count("\n") == 1 and done.stderr.startswith("fake_score: peak ")
  assert "on h100:2: 2 devices (data 1 x fsdp 2 x tensor 1)" in done.stdout
  assert "78.15 GB each" in done.stdout and "92% of the card" in done.stdout
  assert "autotuning" in done.stdout and " kernels launched: " in done.stdout
  (program,) = json.loads(out.read_text())["programs"]
  assert program["fits"] and program["flops"] > 1e9 and sum(program["sent"].values()) > 1e5
  assert program["kernels"]["cuBLAS"] > 1000
