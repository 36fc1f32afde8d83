"""A network that is known ahead of its values: its module, shapes of parameters and key table."""

import functools
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
  return in_dtype(init_shapes(module, *inputs), dtype)


def init_shapes(module: nn.Module, *inputs: Any) -> Any:
  """Shapes and types of the parameters that `module.init` makes; allocates nothing.

  Args:
    module: a module whose fields can be hashed.
    *inputs: an example of its inputs, arrays or `jax.ShapeDtypeStruct`s or None.
  """
  leaves, tree = jax.tree.flatten(inputs)
  abstract = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
  return jax.tree.map(lambda shape: shape, _init_shapes(module, abstract, tree))


@functools.lru_cache
def _init_shapes(module: nn.Module, leaves: tuple[jax.ShapeDtypeStruct, ...], tree: Any) -> Any:
  """Traced once for a process: a check describes the same networks for several parts of a run."""
  inputs = jax.tree.unflatten(tree, leaves)
  return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def in_dtype(shapes: Any, dtype: Any) -> Any:
  """A tree of shapes whose floating-point leaves have another type."""
  return jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(
      s.shape, dtype if jnp.issubdtype(s.dtype, jnp.floating) else s.dtype
    ),
    shapes,
  )
