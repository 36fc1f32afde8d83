"""The kernels against XLA's attention, and which of them is chosen."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh

from rtdmd_jax.models.attention import attention, attention_kernel, even_attention, tiles
from rtdmd_jax.runtime import sharding
from rtdmd_jax.runtime.flops import count_flops
from tests.support.paths import ROOT
from tests.support.xla_flags import xla_flags

# Both sum float32 in another order.
TOLERANCE = 1e-5


def _inputs(length, heads=2, width=16, batch=2):
  rng = np.random.default_rng(0)
  return [rng.normal(size=(batch, length, heads, width)).astype(np.float32) for _ in range(4)]


def _run(kernel, q, k, v, weight, **options):
  def loss(q, k, v):
    with attention_kernel(kernel):
      out = attention(q, k, v, **options)
    return jnp.sum(out * weight), out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
  return out, *grads


@pytest.mark.parametrize("length, width, scale", [(128, 128, None), (150, 16, 0.5)])
def test_splash_is_xla_with_gradients(length, width, scale):
  inputs = _inputs(length, width=width)
  got, want = (_run(kernel, *inputs, scale=scale) for kernel in ("splash", "xla"))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=TOLERANCE * np.abs(b).max())


@pytest.mark.parametrize(
  "length, wanted",
  [
    (1536, (1536, 512)),
    (1357, (1536, 512)),
    (4429, (4608, 512)),
    (700, (768, 256)),
    (5, (128, 128)),
  ],
)
def test_tiles(length, wanted):
  assert tiles(length) == wanted


def _mesh(platform, sizes=(1, 1, 1)):
  device = AbstractDevice(device_kind="any", num_cores=None, platform=platform)
  return AbstractMesh(sizes, sharding.AXES, abstract_device=device)


@pytest.mark.parametrize(
  "platform, kernel, length, wanted",
  [
    ("tpu", "auto", 512, True),
    ("tpu", "auto", 511, False),
    ("tpu", "xla", 512, False),
    ("cpu", "auto", 512, False),
    ("cpu", "splash", 512, True),
  ],
)
def test_the_mesh_and_not_the_host_chooses(platform, kernel, length, wanted):
  shape = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16)
  with jax.sharding.use_abstract_mesh(_mesh(platform)), attention_kernel(kernel):
    jaxpr = jax.make_jaxpr(lambda q, k, v: attention(q, k, v))(shape, shape, shape)
  assert ("pallas_call" in str(jaxpr)) == wanted


def test_a_mask_is_left_to_xla():
  q, k, v, weight = _inputs(8)
  mask = np.tri(8, dtype=bool)[None, None]
  got, want = (_run(kernel, q, k, v, weight, mask=mask) for kernel in ("splash", "xla"))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)


def test_outside_the_context_it_is_xla():
  with jax.sharding.use_abstract_mesh(_mesh("tpu")):
    shape = jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda q: attention(q, q, q))(shape)
  assert "pallas_call" not in str(jaxpr)
  with pytest.raises(ValueError, match="flash"), attention_kernel("flash"):
    pass


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_operations_of_the_kernel_are_counted_on_all_devices(sizes):
  shape = jax.ShapeDtypeStruct((4, 512, 2, 128), jnp.bfloat16)
  products = 2 * 4 * 2 * 512 * 512 * 128

  def loss(q, k, v):
    return jnp.sum(attention(q, k, v).astype(jnp.float32))

  with jax.sharding.use_abstract_mesh(_mesh("tpu", sizes)), attention_kernel("auto"):
    forward = jax.make_jaxpr(loss)(shape, shape, shape)
    both = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(shape, shape, shape)
  assert count_flops(forward) == 2 * products
  # Backward: three products for queries, four for keys and values, and sums over the output.
  assert count_flops(both) == 9 * products + 2 * 4 * 2 * 512 * 128


@pytest.mark.parametrize("length", [149, 150])
def test_a_hidden_token_changes_no_bit(length):
  """The padding that cuDNN's gradient needs, where XLA can run it."""

  def run(attend):
    loss = lambda q, k, v: jnp.sum(attend(q, k, v) * weight)  # noqa: E731
    return jax.jit(attend)(q, k, v), *jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

  q, k, v, weight = _inputs(length)
  want = run(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, scale=0.3))
  got = run(lambda q, k, v: even_attention(q, k, v, 0.3, "xla"))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("length", [1228, 1229])
def test_cudnn_lowers_with_its_gradient(length, monkeypatch):
  """SD3.5-M's joint length is odd; nothing of a GPU is needed to lower for one."""
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
  shape = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16)

  def loss(q, k, v):
    with attention_kernel("cudnn"):
      return attention(q, k, v).astype(jnp.float32).sum()

  traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(shape, shape, shape)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"} <= set(
    re.findall(r"__cudnn[$\w]+", text)
  )
  assert count_flops(traced.jaxpr) == 7 * 2 * 2 * (length + length % 2) ** 2 * 64


_SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from rtdmd_jax.runtime import sharding
from rtdmd_jax.models.attention import attention, attention_kernel
rng = np.random.default_rng(0)
q, k, v, w = (rng.normal(size=(4, 150, 2, 16)).astype(np.float32) for _ in range(4))
def run(kernel):
  def loss(q, k, v):
    with attention_kernel(kernel):
      return jnp.sum(attention(q, k, v) * w)
  return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
want = jax.tree.map(np.asarray, run("xla"))
for sizes in ((2, 2, 2), (1, 8, 1), (1, 2, 4)):
  with jax.set_mesh(sharding.make_mesh(*sizes)):
    for a, b in zip(run("splash"), want, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
"""


@pytest.mark.slow
def test_splash_on_meshes_is_xla_on_one_device():
  env = os.environ | {
    "XLA_FLAGS": xla_flags(8),
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
  }
  done = subprocess.run([sys.executable, "-c", _SHARDED], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
