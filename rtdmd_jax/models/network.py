"""A network that is known ahead of its values: its module, shapes of parameters and key table."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rtdmd_jax.weights.key_table import KeyTable
from rtdmd_jax.weights.safetensors import load_params


class Network(NamedTuple):
  """A frozen network as its config file describes it; no weights have been opened.

  Attributes:
    module: the Flax module.
    shapes: `jax.ShapeDtypeStruct`s of its parameters, in the types in which they are kept.
    table: maps parameters to checkpoint keys, or tells the table of a checkpoint at a path.
    ignore: regular expressions of checkpoint keys that stay unread.
  """

  module: Any
  shapes: Any
  table: KeyTable | Callable[[str | os.PathLike], KeyTable]
  ignore: Sequence[str] = ()

  def load(self, path: str | os.PathLike) -> Any:
    """The parameters in a directory or file of weights, with the shapes and types of `shapes`.

    Raises:
      UserError: missing or broken files, or keys that do not fit.
    """
    table = self.table if isinstance(self.table, KeyTable) else self.table(path)
    return load_params(path, self.shapes, table, ignore=self.ignore)


def param_shapes(module: nn.Module, dtype: Any, *inputs: jax.Array) -> Any:
  """Shapes of a module's parameters kept in `dtype`, given an example of its inputs."""
  return in_dtype(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"], dtype)


def in_dtype(shapes: Any, dtype: Any) -> Any:
  """A tree of shapes whose floating-point leaves have another type."""
  return jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(
      s.shape, dtype if jnp.issubdtype(s.dtype, jnp.floating) else s.dtype
    ),
    shapes,
  )
