"""Key tables: which checkpoint tensor is which parameter.

Modules carry the checkpoint's names, so a table only says what differs: which parameter subtrees
are stacks of layers, and which module names Flax cannot spell (`to_out.0`). The same table reads
and writes, and tells the adapter files which modules a path stands for.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


@dataclass(frozen=True)
class Stack:
  """A parameter subtree whose leaves carry a leading axis of layers.

  Layer i of the subtree at the dotted path `module` is `{key}.{first + i}` in the checkpoint.
  """

  module: str
  key: str
  first: int = 0


@dataclass(frozen=True)
class Entry:
  """One parameter leaf and the tensors it is made of.

  `path` is the leaf's path in the parameter tree. `keys` has one tensor a layer when `stacked`,
  else exactly one. `shape` is the shape of one tensor in the checkpoint, and `axes` the
  permutation from a layer of the leaf to that tensor: `tensor = layer.transpose(axes)`.
  """

  path: tuple[str, ...]
  keys: tuple[str, ...]
  stacked: bool
  shape: tuple[int, ...]
  axes: tuple[int, ...]

  @property
  def dense(self) -> bool:
    """Whether the leaf is the kernel of dense layers: [in, out], or [layers, in, out]."""
    return self.path[-1] == "kernel" and len(self.shape) == 2

  @property
  def inverse_axes(self) -> tuple[int, ...]:
    """The permutation from a checkpoint tensor to a layer of the leaf."""
    return tuple(self.axes.index(i) for i in range(len(self.axes)))


@dataclass(frozen=True)
class KeyTable:
  """The difference between a parameter tree and a family's checkpoint.

  By default the path is joined with dots and the leaf renamed: `kernel`, `scale` and `embedding`
  become `weight`, other leaves keep their name. A `kernel` [*window, in, out] is stored as
  [out, in, *window], which covers dense layers and convolutions.

  Attributes:
    stacks: subtrees with a leading axis of layers.
    renames: (regular expression, replacement) pairs, applied in this order with `re.sub` to the
      dotted checkpoint name of the module (after the stack's prefix has been put in).
  """

  stacks: Sequence[Stack] = ()
  renames: Sequence[tuple[str, str]] = ()

  def modules(self, path: Sequence[str], layers: int | None = None) -> tuple[str, ...]:
    """The checkpoint's module names for a module path: one a layer inside a stack, else one.

    Args:
      path: module path in the parameter tree, without the leaf name.
      layers: length of the leading axis; needed, and only used, inside a stack.
    """
    dotted = ".".join(path)
    stack = self.stack_of(path)
    if stack is None:
      return (self._rename(dotted),)
    if layers is None:
      raise ValueError(f"{dotted} lies in a stack: the number of layers is needed")
    rest = dotted[len(stack.module) :]
    return tuple(self._rename(f"{stack.key}.{stack.first + i}{rest}") for i in range(layers))

  def stack_of(self, path: Sequence[str]) -> Stack | None:
    """The stack that a path lies in, or None."""
    dotted = ".".join(path) + "."
    return next((s for s in self.stacks if dotted.startswith(s.module + ".")), None)

  def entries(self, abstract_params: Any) -> list[Entry]:
    """One entry a leaf of `abstract_params` (nested dicts of anything with a shape).

    Raises:
      ValueError: two leaves claim the same checkpoint key.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_params)
    entries = [self._entry(tuple(k.key for k in path), leaf.shape) for path, leaf in leaves]
    seen: dict[str, tuple[str, ...]] = {}
    for entry in entries:
      for key in entry.keys:
        if key in seen:
          raise ValueError(f"{entry.path} and {seen[key]} both map to checkpoint key {key}")
        seen[key] = entry.path
    return entries

  def _entry(self, path: tuple[str, ...], shape: tuple[int, ...]) -> Entry:
    module, leaf = path[:-1], path[-1]
    stacked = self.stack_of(path) is not None
    layer_shape = shape[1:] if stacked else shape
    axes = tuple(range(len(layer_shape)))
    if leaf == "kernel":
      axes = (axes[-1], axes[-2], *axes[:-2])
    name = _LEAF_NAMES.get(leaf, leaf)
    if module:
      modules = self.modules(module, shape[0] if stacked else None)
      keys = tuple(f"{m}.{name}" for m in modules)
    else:
      keys = (name,)
    return Entry(path, keys, stacked, tuple(layer_shape[a] for a in axes), axes)

  def _rename(self, name: str) -> str:
    for pattern, replacement in self.renames:
      name = re.sub(pattern, replacement, name)
    return name
