"""Floating-point operations of a traced program, loops included.

XLA's own count takes the body of a loop once, so scanned blocks would count as one.
"""

import math
from collections.abc import Iterator
from typing import Any

# Matrix products of cuDNN's attention kernels: scores and output; backward the scores once more and
# the gradients of output's and scores' two factors each.
_CUDNN_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def count_flops(jaxpr: Any, unknown_turns: float = 1) -> float:
  """Operations of all matrix products and convolutions, a multiplication and an addition each.

  Counts the whole program, not one device's share; elementwise work is left out. Of the branches of
  a condition the most expensive one counts. What rematerialisation recomputes counts.

  Args:
    jaxpr: a `Jaxpr` or `ClosedJaxpr`.
    unknown_turns: turns of loops whose number is only known when the program runs.
  """
  total = 0.0
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    name = eqn.primitive.name
    if name == "dot_general":
      total += _dot(eqn)
    elif name == "conv_general_dilated":
      total += _convolution(eqn)
    elif name in _CUDNN_PRODUCTS:
      total += _CUDNN_PRODUCTS[name] * _attention_product(eqn)
    elif name == "pallas_call":
      # Every tile is taken to be computed, as it is without a causal mask.
      turns = math.prod(eqn.params["grid_mapping"].grid)
      total += turns * count_flops(eqn.params["jaxpr"], unknown_turns)
    elif name == "shard_map":
      # The trace inside is that of one device.
      total += eqn.params["mesh"].size * count_flops(eqn.params["jaxpr"], unknown_turns)
    else:
      inner = [count_flops(sub, unknown_turns) for sub in _inner(eqn.params)]
      if name == "cond":
        total += max(inner)
      elif name == "while":
        total += unknown_turns * sum(inner)
      else:
        total += sum(inner) * (eqn.params["length"] if name == "scan" else 1)
  return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
  """The programs inside an equation's parameters."""
  for value in params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if hasattr(getattr(item, "jaxpr", item), "eqns"):
        yield item


def _dot(eqn: Any) -> float:
  (contracted, _), _ = eqn.params["dimension_numbers"]
  left = eqn.invars[0].aval.shape
  return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _attention_product(eqn: Any) -> float:
  """A product of queries [B, Lq, H, D] with keys [B, Lk, H, D]."""
  (batch, queries, heads, width), keys = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape[1]
  return 2.0 * batch * heads * queries * keys * width


def _convolution(eqn: Any) -> float:
  kernel = eqn.invars[1].aval.shape
  out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
  out = math.prod(eqn.outvars[0].aval.shape)
  # Zeros between the entries of a dilated input cost nothing.
  dilation = math.prod(eqn.params["lhs_dilation"])
  return 2.0 * out * math.prod(kernel) / out_features / dilation
