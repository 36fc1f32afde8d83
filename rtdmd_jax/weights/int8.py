"""Kernels of frozen bases as int8, with one float32 scale an output channel.

The parameter tree keeps its names: a `kernel` [..., in, out] becomes int8 and gets a neighbour
`kernel_scale` [..., out]; the weight is their product. Quantisation is symmetric, to -127 .. 127.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rtdmd_jax.weights.key_table import KeyTable

# How the bases of a run may be stored: in the type of the computation, or large kernels as int8.
STORAGES = ("native", "int8")
SCALE = "kernel_scale"


def quantise(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The nearest int8 values and their scales; a weight moves by half a scale at most.

  Args:
    kernel: [in, out] float32. A channel that is not finite gets a scale that is not.

  Returns:
    (values [in, out] int8, scale [out] float32).
  """
  largest = np.maximum(kernel.max(axis=0), -kernel.min(axis=0))
  scale = np.maximum(largest / np.float32(127), np.finfo(np.float32).tiny)
  with np.errstate(invalid="ignore"):
    scaled = kernel / scale
    return np.rint(scaled, out=scaled).astype(np.int8), scale


def int8_shapes(abstract_params: Any, table: KeyTable) -> Any:
  """Shapes of parameters whose dense kernels are int8, as `load_params` then makes them.

  Args:
    abstract_params: nested dicts of `jax.ShapeDtypeStruct`s.
    table: tells dense kernels from convolutions, which stay as they are.
  """
  flat = flatten_dict(abstract_params)
  for entry in table.entries(abstract_params):
    if entry.dense:
      shape = flat[entry.path].shape
      flat[entry.path] = jax.ShapeDtypeStruct(shape, jnp.int8)
      scale = (*entry.path[:-1], SCALE)
      flat[scale] = jax.ShapeDtypeStruct((*shape[:-2], shape[-1]), jnp.float32)
  return unflatten_dict(flat)
