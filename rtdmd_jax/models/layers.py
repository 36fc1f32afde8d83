"""Layers every model shares; each dense layer can carry low-rank adapters."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rtdmd_jax.weights import int8

Dtype = Any

# Collections of adapters that a dense layer adds, in this order.
ADAPTER_COLLECTIONS = ("lora_frozen", "lora")


@jax.custom_vjp
def int8_product(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
  """`x @ (values * scale)` for x [..., in], int8 values [in, out] and float32 scale [out].

  The backward pass converts the values again. By itself jax would keep what the forward pass
  converted, which of a stack of blocks is a whole floating-point copy. Only x has a gradient.
  """
  y = x @ values.astype(x.dtype)
  return (y.astype(jnp.float32) * scale).astype(x.dtype)


def _int8_forward(x: jax.Array, values: jax.Array, scale: jax.Array) -> tuple[jax.Array, Any]:
  return int8_product(x, values, scale), (values, scale)


def _int8_backward(kernel: Any, gradient: jax.Array) -> tuple[jax.Array, None, None]:
  values, scale = kernel
  scaled = (gradient.astype(jnp.float32) * scale).astype(gradient.dtype)
  return scaled @ values.T.astype(gradient.dtype), None, None


int8_product.defvjp(_int8_forward, _int8_backward)


@jax.custom_vjp
def adapted_product(x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  """`x @ (kernel + a @ b)` for x [..., in], kernel [in, out], a [in, r] and b [r, out].

  With many rows the folded kernel costs less than a branch of its own, forwards and backwards;
  the gradients of `a` and `b` are those of the branch, so that none has the kernel's size.
  """
  return x @ (kernel + a @ b)


def _adapted_forward(
  x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, Any]:
  return adapted_product(x, kernel, a, b), (x, kernel, a, b)


def _adapted_backward(residuals: Any, gradient: jax.Array) -> tuple[jax.Array, ...]:
  x, kernel, a, b = residuals
  rows, out = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
  # The kernel's own is left out of the program where nothing asks for it.
  return (
    gradient @ (kernel + a @ b).T,
    rows.T @ out,
    rows.T @ (out @ b.T),
    (rows @ a).T @ out,
  )


adapted_product.defvjp(_adapted_forward, _adapted_backward)


class Dense(nn.Module):
  """A dense layer plus one low-rank branch per adapter collection that has an entry here.

  An adapter entry at this module's path is `{"a": [D_in, r], "b": [r, D_out]}`; it adds
  `(x @ a) @ b`. The scale alpha / r is folded into `b` by the caller, so that models know neither
  rank nor targets. `params` may be low precision; adapters are cast to `dtype`.
  A `kernel_scale` [features] beside an int8 kernel multiplies its columns (`weights.int8`).
  """

  features: int
  use_bias: bool = True
  dtype: Dtype = jnp.float32
  kernel_init: Callable = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., D_in] to [..., features]."""
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
    x = x.astype(self.dtype)
    adapters = self._adapters()
    if self.has_variable("params", int8.SCALE):
      y = int8_product(x, kernel, self.get_variable("params", int8.SCALE))
    else:
      kernel = kernel.astype(self.dtype)
      # In half precision a small adapter would be lost in the kernel's rounding.
      if self.dtype == jnp.float32 and adapters:
        *frozen, (a, b) = adapters
        y = adapted_product(x, sum((a @ b for a, b in frozen), kernel), a, b)
        adapters = []
      else:
        y = x @ kernel
    if self.use_bias:
      y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
    for a, b in adapters:
      y += (x @ a) @ b
    return y

  def _adapters(self) -> list[tuple[jax.Array, jax.Array]]:
    """The factors (a, b) of every adapter collection with an entry here."""
    return [
      tuple(self.get_variable(name, key).astype(self.dtype) for key in ("a", "b"))
      for name in ADAPTER_COLLECTIONS
      if self.has_variable(name, "a")
    ]
