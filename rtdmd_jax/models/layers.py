"""Layers every model shares; each dense layer can carry low-rank adapters."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Dtype = Any

# Collections of adapters that a dense layer adds, in this order.
ADAPTER_COLLECTIONS = ("lora_frozen", "lora")


class Dense(nn.Module):
  """A dense layer plus one low-rank branch per adapter collection that has an entry here.

  An adapter entry at this module's path is `{"a": [D_in, r], "b": [r, D_out]}`; it adds
  `(x @ a) @ b`. The scale alpha / r is folded into `b` by the caller, so that models know neither
  rank nor targets. `params` may be low precision; adapters are float32 masters cast to `dtype`.
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
    y = x @ kernel.astype(self.dtype)
    if self.use_bias:
      y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
    for collection in ADAPTER_COLLECTIONS:
      if self.has_variable(collection, "a"):
        a = self.get_variable(collection, "a").astype(self.dtype)
        b = self.get_variable(collection, "b").astype(self.dtype)
        y += (x @ a) @ b
    return y
