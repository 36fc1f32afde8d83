"""The placement of arrays: the mesh, one table from parameter names to axes, and the batch's axes.

Axes: `data` repeats the parameters and splits the batch, `fsdp` splits both, `tensor` splits the
features inside a layer. Results do not depend on the mesh: every random number is a function of a
sample's global index.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from rtdmd_jax.errors import UserError

Tree = Any

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# First match wins. The axes are those of a leaf's last dimensions; leading ones (the stack of
# blocks, a convolution's window) are never split. The optimizer's moments have the names of what
# they belong to, so the table covers them too.
_OWN: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  # Adapters: the long side of each factor.
  (r"/a$", ("fsdp", None)),
  (r"/b$", (None, "fsdp")),
  # Convolutions are small, and splitting their channels would cut across group norms.
  (r"/(conv\w*|proj|patch_embedding|quant_conv|post_quant_conv)/kernel$", (None, None)),
  # Into the heads or the hidden layer: split what comes out.
  (r"/(to_[qkv]|(add_)?[qkv]_proj|SelfAttention/[qkv])/kernel$", ("fsdp", "tensor")),
  (r"/(net_0_proj|proj_mlp|fc1|gate_proj|up_proj|wi(_\d)?)/kernel$", ("fsdp", "tensor")),
  # Back to the residual stream: split what goes in.
  (r"/(to_out_0|to_add_out|out_proj|o_proj|SelfAttention/o)/kernel$", ("tensor", "fsdp")),
  (r"/(net_2|linear_out|fc2|down_proj|wo)/kernel$", ("tensor", "fsdp")),
  # Fused projections mix parts of different meaning in one axis, which `tensor` would cut across.
  (r"/kernel$", ("fsdp", None)),
  (r"/(embedding|pos_embed)$", (None, "fsdp")),
  (r"/(bias|scale|class_embedding)$", (None,)),
)
# The scales of an int8 kernel lie along its last axis.
_SCALES = tuple((p[:-1] + "_scale$", axes[-1:]) for p, axes in _OWN if p.endswith("/kernel$"))
RULES = (*_OWN, *_SCALES)
# A leaf without a rule may be repeated up to this many elements.
SMALL = 2**16
HOST = "pinned_host"


def make_mesh(
  data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
  """A mesh over all devices; one axis may be -1 and takes what the others leave.

  Several TPU slices (pods joined by a slower network) are split along `data`. GPUs report a slice
  per host; their hosts may be split along any axis.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes, count = [data, fsdp, tensor], len(devices)
  if sizes.count(-1) > 1 or any(size != -1 and size < 1 for size in sizes):
    raise UserError(f"mesh is {_show(sizes)}; sizes are positive and at most one is -1.")
  if -1 in sizes:
    rest = math.prod(size for size in sizes if size != -1)
    sizes[sizes.index(-1)] = count // rest if rest and count % rest == 0 else 0
  if math.prod(sizes) != count:
    raise UserError(
      f"mesh is {_show([data, fsdp, tensor])}, which does not fit {count} devices; make the"
      f" product of the sizes {count}."
    )
  tpus = [device for device in devices if device.platform == "tpu"]
  slices = len({getattr(device, "slice_index", 0) for device in tpus})
  if slices > 1:
    if sizes[0] % slices:
      raise UserError(f"mesh.data is {sizes[0]}; use a multiple of the {slices} slices.")
    inside = (sizes[0] // slices, *sizes[1:])
    grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices)
  else:
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return Mesh(grid, AXES)


def _show(sizes: Sequence[int]) -> str:
  return " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))


def spec(name: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
  """Axes of the leaf `name` ("blocks_0/attn/to_q/kernel"); a side that does not divide stays whole.

  Raises:
    ValueError: a leaf of more than `SMALL` elements that no rule covers.
  """
  axes = next((axes for pattern, axes in RULES if re.search(pattern, f"/{name}")), None)
  if axes is None:
    if math.prod(shape) > SMALL:
      raise ValueError(f"no sharding rule covers {name} {tuple(shape)}; add one to RULES")
    return PartitionSpec()
  axes = (None,) * (len(shape) - len(axes)) + tuple(axes)[max(len(axes) - len(shape), 0) :]
  fits = (
    axis if axis and size % mesh.shape[axis] == 0 else None
    for axis, size in zip(axes, shape, strict=True)
  )
  return PartitionSpec(*fits)


def current() -> Mesh | None:
  """The mesh of the surrounding `jax.set_mesh`, None outside of one."""
  mesh = jax.sharding.get_mesh()
  return None if mesh.empty else mesh


def shardings(tree: Tree, mesh: Mesh, *, offload: bool = False) -> Tree:
  """The `NamedSharding` of every leaf of a tree of arrays or `ShapeDtypeStruct`s.

  With `offload` the kernels of stacked blocks, nearly all of a network, lie in the memory of the
  hosts, from where the blocks fetch them (`to_device`). Vectors cannot be sliced there.
  """

  def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    name = _name(path)
    there = offload and len(leaf.shape) == 3 and name.endswith("/kernel")
    return NamedSharding(mesh, spec(name, leaf.shape, mesh), memory_kind=HOST if there else None)

  return jax.tree_util.tree_map_with_path(one, tree)


def shard_on(tree: Tree, mesh: Mesh, *, offload: bool = False) -> Tree:
  """Shapes of a tree as it lies on a mesh; see `shardings`."""
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
    tree,
    shardings(tree, mesh, offload=offload),
  )


def on_host(leaf: Any) -> bool:
  """Whether an array, or the shape of one, lies in the memory of the hosts."""
  return getattr(getattr(leaf, "sharding", None), "memory_kind", None) == HOST


def device_put(tree: Tree, sharding: Any) -> Tree:
  """`jax.device_put(tree, sharding)` for meshes over several processes too.

  There each process takes its own parts of the arrays it has on the host, which must be equal in
  all of them; unlike in `jax.device_put` nothing is sent to compare them.

  Args:
    tree: of arrays.
    sharding: one for all leaves, a tree of them, or None for jax's default device.
  """
  first = next(iter(jax.tree.leaves(sharding)), None)
  if first is None or first.is_fully_addressable:
    return jax.device_put(tree, sharding)
  if isinstance(sharding, Sharding):
    return jax.tree.map(lambda leaf: _put_parts(leaf, sharding), tree)
  return jax.tree.map(_put_parts, tree, sharding)


def _put_parts(leaf: Any, sharding: Sharding) -> jax.Array:
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    return jax.device_put(leaf, sharding)
  array = np.asarray(leaf)
  array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
  return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def to_numpy(tree: Tree) -> Tree:
  """The whole arrays, as numpy; of arrays over several processes all must ask for them."""

  def whole(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      return leaf if leaf.is_fully_replicated else replicate(leaf)
    return leaf

  return jax.device_get(jax.tree.map(whole, tree))


def local_rows(array: jax.Array) -> tuple[np.ndarray, np.ndarray]:
  """Indices [n], ascending, and values [n, ...] of the rows that this process holds.

  `array` is split along its first axis at most. Of several processes that hold a row, one gets it.
  """
  parts = {}
  for shard in array.addressable_shards:
    if shard.replica_id == 0:
      parts[shard.index[0].indices(len(array))[0]] = jax.device_get(shard.data)
  rows = [np.arange(start, start + len(parts[start])) for start in sorted(parts)]
  if not rows:
    return np.zeros(0, int), np.zeros((0, *array.shape[1:]), array.dtype)
  return np.concatenate(rows), np.concatenate([parts[start] for start in sorted(parts)])


def shard(tree: Tree, *, offload: bool = False) -> Tree:
  """Puts every array where `shardings` says on the current mesh, or on jax's default device."""
  mesh = current()
  return device_put(tree, None if mesh is None else shardings(tree, mesh, offload=offload))


def replicate(tree: Tree) -> Tree:
  """Puts every array on all devices of the current mesh, or on jax's default device."""
  mesh = current()
  return device_put(tree, None if mesh is None else NamedSharding(mesh, PartitionSpec()))


def split_batch(tree: Tree) -> Tree:
  """Splits the first axis of every array over the batch's axes of the current mesh."""
  mesh = current()
  return device_put(tree, None if mesh is None else NamedSharding(mesh, PartitionSpec(BATCH_AXES)))


def split_or_replicate(tree: Tree) -> Tree:
  """`split_batch` of arrays [P, ...] where all P divide into `batch_parts()`, else `replicate`."""
  whole = any(len(leaf) % batch_parts() for leaf in jax.tree.leaves(tree))
  return replicate(tree) if whole else split_batch(tree)


def constrain_by_rules(tree: Tree) -> Tree:
  """Inside a compiled program: keeps every array of `tree` where the table says."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return tree
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: jax.lax.with_sharding_constraint(leaf, spec(_name(path), leaf.shape, mesh)),
    tree,
  )


def batch_parts() -> int:
  """Into how many parts the current mesh splits a batch."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Inside a compiled program: splits the first axis of `x` over the batch's axes, others as told.

  Does nothing without `jax.set_mesh`, and leaves whole what does not divide.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, activation_spec(x.shape, mesh, *axes))


def activation_spec(shape: Sequence[int], mesh: Any, *axes: str | None) -> PartitionSpec:
  """The batch's axes for the first side, `axes` for those after it where they divide."""
  batch = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  rest = [
    axis if axis and size % mesh.shape[axis] == 0 else None
    for axis, size in zip(axes, shape[1:], strict=False)
  ]
  return PartitionSpec(BATCH_AXES if shape[0] % batch == 0 else None, *rest)


def platform() -> str:
  """Where the program that is being traced will run: "tpu", "gpu" or "cpu".

  The current mesh tells, so that ahead of time the answer is not the host's.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def table(trees: Mapping[str, Tree], mesh: Mesh) -> list[tuple[str, int, int, int]]:
  """The placement of each tree: (name, parameters, bytes in all, bytes on one device).

  What lies in the memory of the hosts takes no bytes of a device.
  """
  rows = []
  for name, tree in trees.items():
    count = total = local = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      shape, item = leaf.shape, np.dtype(leaf.dtype).itemsize
      sharding = NamedSharding(mesh, spec(_name(path), shape, mesh))
      count += math.prod(shape)
      total += item * math.prod(shape)
      local += 0 if on_host(leaf) else item * math.prod(sharding.shard_shape(shape))
    rows.append((name, count, total, local))
  return rows


def _name(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def to_device(params, after=None):
  """Copies what lies in the host's memory to the device; the rest is there already.

  Args:
    params: a tree of arrays. What is copied has no gradient.
    after: a tree of arrays that the copies wait for; None for none.
  """
  space, constant = jax.memory.Space, jax.lax.stop_gradient

  def one(leaf: jax.Array) -> jax.Array:
    if jax.typeof(leaf).memory_space != space.Host:
      return leaf
    if after is not None:
      leaf, _ = jax.lax.optimization_barrier((constant(leaf), constant(after)))
    return jax.device_put(leaf, space.Device)

  return jax.tree.map(one, params)
