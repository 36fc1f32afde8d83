"""What compiled programs compute on the way."""

from collections import Counter

import jax.numpy as jnp


def float_results(jaxpr, shapes):
  """Which of `shapes` a floating-point result of any step has, also with its axes in another order.

  Args:
    jaxpr: closed or not; programs inside it are searched, too.
    shapes: set of tuples.
  """
  wanted, found = {tuple(sorted(s)): s for s in shapes}, set()
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  for eqn in jaxpr.eqns:
    for out in eqn.outvars:
      key = tuple(sorted(getattr(out.aval, "shape", ())))
      if key in wanted and jnp.issubdtype(out.aval.dtype, jnp.floating):
        found |= {s for s in shapes if tuple(sorted(s)) == key}
    for value in eqn.params.values():
      for item in value if isinstance(value, tuple | list) else (value,):
        if hasattr(getattr(item, "jaxpr", item), "eqns"):
          found |= float_results(item, shapes)
  return found


def call_sites(jaxpr):
  """How often each primitive stands in a program, which is how often it is compiled; a Counter."""
  found = Counter()
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    found[eqn.primitive.name] += 1
    for value in eqn.params.values():
      for item in value if isinstance(value, tuple | list) else (value,):
        if hasattr(getattr(item, "jaxpr", item), "eqns"):
          found += call_sites(item)
  return found
