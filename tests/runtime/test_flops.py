"""Counted operations against closed forms."""

import jax
import jax.numpy as jnp
import pytest

from rtdmd_jax.models import build_transformer
from rtdmd_jax.runtime.flops import count_flops


def _count(function, *shapes, turns=1):
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return count_flops(jax.make_jaxpr(function)(*args), turns)


def test_matmul_and_batched_einsum():
  assert _count(jnp.matmul, (5, 7), (7, 11)) == 2 * 5 * 7 * 11
  attention = lambda q, k: jnp.einsum("blhd,bmhd->bhlm", q, k)  # noqa: E731
  assert _count(attention, (2, 6, 3, 4), (2, 9, 3, 4)) == 2 * 2 * 3 * 6 * 9 * 4


def test_gradient_of_a_matmul_is_two_more():
  loss = lambda x, w: jnp.sum((x @ w) ** 2)  # noqa: E731
  assert _count(jax.grad(loss, (0, 1)), (5, 7), (7, 11)) == 3 * 2 * 5 * 7 * 11


def test_a_scan_counts_every_turn_and_remat_its_recomputation():
  def body(x, w):
    return jnp.tanh(x @ w), None

  def run(block, x, w):
    return jnp.sum(jax.lax.scan(block, x, w)[0])

  one = 2 * 4 * 8 * 8
  x, w = (4, 8), (6, 8, 8)
  assert _count(lambda x, w: run(body, x, w), x, w) == 6 * one
  grad = jax.grad(lambda w, x: run(jax.checkpoint(body, prevent_cse=False), x, w))
  assert _count(grad, w, x) == 6 * 4 * one  # forward, again, and two products backward


def test_loops_of_unknown_length_and_conditions():
  def loop(n, x):
    return jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)

  jaxpr = jax.make_jaxpr(loop)(3, jnp.zeros((4, 4)))
  assert count_flops(jaxpr) == 2 * 4**3
  assert count_flops(jaxpr, 3) == 3 * 2 * 4**3

  def either(x, w):
    return jax.lax.cond(jnp.sum(x) > 0, lambda: x @ w @ w, lambda: x @ w)

  assert _count(either, (4, 4), (4, 4)) == 2 * 2 * 4**3


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(groups):
  def convolve(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
      x, kernel, (2, 2), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )

  wanted = 2 * (3 * 4 * 4 * 10) * (3 * 3 * 6 // groups)
  assert _count(convolve, (3, 8, 8, 6), (3, 3, 6 // groups, 10)) == wanted


def test_gradients_of_a_strided_convolution_cost_as_much_as_itself():
  def loss(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jnp.sum(
      jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=numbers) ** 2
    )

  forward = 2 * (3 * 4 * 4 * 10) * (2 * 2 * 6)
  assert _count(jax.grad(loss, (0, 1)), (3, 8, 8, 6), (2, 2, 6, 10)) == 3 * forward


def test_a_stack_of_blocks_counts_like_its_unrolled_form():
  config = {
    "_class_name": "Flux2Transformer2DModel", "in_channels": 8, "num_layers": 2,
    "num_single_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 12, "axes_dims_rope": (2, 2, 2, 2), "guidance_embeds": False,
  }  # fmt: skip
  counts = []
  for scan in (True, False):
    net = build_transformer(config, scan=scan)
    counts.append(count_flops(jax.make_jaxpr(net.velocity)(net.init_abstract(), *net.example[:3])))
  assert counts[0] == counts[1]
  # Lengths: one image token, one text token; products with the weights of the blocks alone.
  blocks = 2 * sum(
    leaf.size
    for name in ("transformer_blocks", "single_transformer_blocks")
    for leaf in jax.tree.leaves(net.init_abstract()[name])
    if leaf.ndim == 3
  )
  assert counts[0] > blocks


def test_a_kernel_counts_for_every_tile_of_its_grid():
  from jax.experimental import pallas as pl

  def product(x, w):
    def kernel(x_ref, w_ref, o_ref):
      o_ref[...] = x_ref[...] @ w_ref[...]

    rows = pl.BlockSpec((8, 128), lambda i: (i, 0))
    return pl.pallas_call(
      kernel,
      grid=(4,),
      in_specs=[rows, pl.BlockSpec((128, 128), lambda i: (0, 0))],
      out_specs=rows,
      out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    )(x, w)

  assert _count(product, (32, 128), (128, 128)) == 2 * 32 * 128 * 128
