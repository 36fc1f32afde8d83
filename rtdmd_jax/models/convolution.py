"""Convolutions that are fast to compile and to differentiate on every platform."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rtdmd_jax.runtime.sharding import platform

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# A TPU's compiler takes seven times as long for few pixels of many channels as for a loop over
# blocks of their rows. Others would save little in blocks and run longer (docs/hardware.md).
_FEW_ROWS, _MANY_CHANNELS, _BLOCK = 64, 512, 16


@jax.custom_vjp
def same_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolves x [B, H, W, C_in] with kernel [k, k, C_in, C_out], k odd, to [B, H, W, C_out].

  The gradient by x is the convolution with the turned kernel, written as such: inside a loop or a
  branch XLA computes jax's own form of it more than ten times as slowly on a CPU.
  """
  if platform() == "tpu" and _slow_to_compile(x.shape, kernel.shape):
    return convolve_blocks(x, kernel, _BLOCK)
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_LAYOUT)


def _slow_to_compile(image: Sequence[int], kernel: Sequence[int]) -> bool:
  (_, height, _, _), (size, _, *channels) = image, kernel
  few = _BLOCK < height <= _FEW_ROWS and height % _BLOCK == 0
  return size > 1 and few and min(channels) >= _MANY_CHANNELS


def convolve_blocks(x: jax.Array, kernel: jax.Array, rows: int) -> jax.Array:
  """`same_convolution` of `rows` rows at a time, a divisor of H, in a loop."""
  batch, height, width, _ = x.shape
  margin = kernel.shape[0] // 2
  padded = jnp.pad(x, ((0, 0), (margin, margin), (0, 0), (0, 0)))

  def block(first: jax.Array) -> jax.Array:
    part = jax.lax.dynamic_slice_in_dim(padded, first, rows + 2 * margin, axis=1)
    padding = ((0, 0), (margin, margin))
    return jax.lax.conv_general_dilated(part, kernel, (1, 1), padding, dimension_numbers=_LAYOUT)

  blocks = jax.lax.map(block, jnp.arange(0, height, rows))  # [H / rows, B, rows, W, C_out]
  return jnp.moveaxis(blocks, 0, 1).reshape(batch, height, width, -1)


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


def convolve_patches(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Maps patches of x [B, H, W, C_in] by kernel [p, p, C_in, C_out] to [B, H / p, W / p, C_out].

  What a convolution with stride p is, as one product: a TPU's compiler takes most of a minute for
  that convolution's gradient by x (docs/hardware.md).
  """
  batch, height, width, channels = x.shape
  size = kernel.shape[0]
  x = x.reshape(batch, height // size, size, width // size, size, channels)
  return jnp.einsum("bhiwjc,ijcd->bhwd", x, kernel)


def convolve(
  x: jax.Array,
  kernel: jax.Array,
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  **options: Any,
) -> jax.Array:
  """`jax.lax.conv_general_dilated`, by one of the above where that is the same."""
  window, strides, padding = kernel.shape[:2], tuple(strides), list(padding)
  if strides == (1, 1) and padding == [(n // 2, n // 2) for n in window] and window[0] % 2:
    return same_convolution(x, kernel)
  whole = all(side % n == 0 for side, n in zip(x.shape[1:3], window, strict=True))
  if strides == window and padding == [(0, 0), (0, 0)] and window[0] == window[1] and whole:
    return convolve_patches(x, kernel)
  return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
