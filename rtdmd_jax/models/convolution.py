"""Convolutions whose gradients are fast on every platform."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

_LAYOUT = ("NHWC", "HWIO", "NHWC")


@jax.custom_vjp
def same_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolves x [B, H, W, C_in] with kernel [k, k, C_in, C_out], k odd, to [B, H, W, C_out].

  The gradient by x is the convolution with the turned kernel, written as such: inside a loop or a
  branch XLA computes jax's own form of it more than ten times as slowly on a CPU.
  """
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_LAYOUT)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return same_convolution(x, kernel), (x, kernel)


def _backward(
  inputs: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x, kernel = inputs
  turned = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
  by_kernel = jax.linear_transpose(
    lambda kernel: jax.lax.conv_general_dilated(
      x, kernel, (1, 1), "SAME", dimension_numbers=_LAYOUT
    ),
    kernel,
  )
  return same_convolution(gradient, turned), *by_kernel(gradient)


same_convolution.defvjp(_forward, _backward)


def convolve(
  x: jax.Array,
  kernel: jax.Array,
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  **options: Any,
) -> jax.Array:
  """`jax.lax.conv_general_dilated`, by `same_convolution` where that is the same."""
  same = [(size // 2, size // 2) for size in kernel.shape[:2]]
  if tuple(strides) == (1, 1) and list(padding) == same and kernel.shape[0] % 2:
    return same_convolution(x, kernel)
  return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
