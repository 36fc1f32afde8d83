"""Low-rank adapters as trees beside the parameters.

An adapter tree mirrors the parameter tree down to the module: at a dense layer's path it has
`{"a": [in, r], "b": [r, out]}`, both with a leading axis of layers inside a stack. The layer adds
`(x @ a) @ b`, so the scale alpha / r must be folded into `b` first (`fold_scale`).
"""

import zlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rtdmd_jax.errors import UserError
from rtdmd_jax.weights.key_table import Entry, KeyTable

# Standard deviation of `a` at the start, given the rank; `b` starts at 0. "gaussian" is PEFT's,
# "normal" RTDMD's after a merge; with "rsqrt" a first update of `b` moves the layer's output as far
# at every rank.
INITS = {
  "gaussian": lambda rank: 1.0 / rank,
  "normal": lambda rank: 1.0,
  "rsqrt": lambda rank: rank**-0.5,
}
# What adapters in training may be stored in.
DTYPES = ("float32", "bfloat16")


def matches(module: str, target: str) -> bool:
  """PEFT's rule: a target is a dotted module name or a whole-component suffix of one."""
  return module == target or module.endswith("." + target)


def module_names(entry: Entry) -> tuple[str, ...]:
  """The checkpoint's module names of a weight's entry, one a layer inside a stack."""
  return tuple(key.removesuffix(".weight") for key in entry.keys)


def dense_entries(abstract_params: Any, table: KeyTable) -> list[Entry]:
  """The kernels that can carry an adapter: [in, out], or [layers, in, out] in a stack."""
  entries = table.entries(abstract_params)
  return [entry for entry in entries if entry.dense]


def target_entries(abstract_params: Any, table: KeyTable, targets: Sequence[str]) -> list[Entry]:
  """The kernels that a list of targets chooses.

  Raises:
    UserError: a target matches no dense layer (the nearest names are given), or the targets
      choose some but not all layers of a stack.
  """
  entries = dense_entries(abstract_params, table)
  names = [name for entry in entries for name in module_names(entry)]
  for target in targets:
    if not any(matches(name, target) for name in names):
      raise UserError(f"lora target {target!r} matches no dense layer{_nearest(target, names)}.")
  chosen = []
  for entry in entries:
    hits = [any(matches(name, t) for t in targets) for name in module_names(entry)]
    if any(hits) and not all(hits):
      left_out = module_names(entry)[hits.index(False)]
      raise UserError(f"lora targets choose some layers of a stack but not {left_out}; add it.")
    if all(hits):
      chosen.append(entry)
  return chosen


def _nearest(target: str, names: Sequence[str]) -> str:
  suffixes = {
    ".".join(parts[i:]) for parts in (name.split(".") for name in names) for i in range(len(parts))
  }
  near = get_close_matches(target, sorted(suffixes), n=3)
  return f"; the nearest names are {', '.join(near)}" if near else ""


def build_adapters(
  abstract_params: Any,
  table: KeyTable,
  targets: Sequence[str],
  *,
  rank: int,
  key: jax.Array,
  init: str = "gaussian",
  dtype: Any = jnp.float32,
) -> dict[str, Any]:
  """Fresh adapters: `a` normal, `b` zero, so that nothing changes at the start.

  Args:
    abstract_params: nested dicts of leaves with a shape.
    table: the family's key table; targets are checkpoint names.
    targets: dense layers by PEFT's rule, for instance `attn.to_q` (not `attn2.to_q`) or
      `attn.to_out.0`.
    rank: r, at least 1.
    key: each layer's draw depends on it and on the layer's path only.
    init: of `a`: normal with standard deviation 1/r ("gaussian", as PEFT), 1 ("normal") or r**-0.5
      ("rsqrt").
    dtype: of the leaves; draws are float32, rounded at the end.

  Returns:
    The adapter tree.

  Raises:
    UserError: as `target_entries`, a rank below 1, no targets, or an unknown init.
  """
  if rank < 1:
    raise UserError(f"lora.rank is {rank}; adapters need at least 1.")
  if not targets:
    raise UserError("lora.targets is empty; name at least one dense layer.")
  if init not in INITS:
    raise UserError(f"lora.init is {init!r}; choose one of {', '.join(INITS)}.")
  flat = {}
  for entry in target_entries(abstract_params, table, targets):
    out_features, in_features = entry.shape
    stack = (len(entry.keys),) if entry.stacked else ()
    module = entry.path[:-1]
    own_key = jax.random.fold_in(key, zlib.crc32(".".join(module).encode()))
    a = INITS[init](rank) * jax.random.normal(own_key, (*stack, in_features, rank))
    flat[(*module, "a")] = a.astype(dtype)
    flat[(*module, "b")] = jnp.zeros((*stack, rank, out_features), dtype)
  return unflatten_dict(flat)


def fold_scale(adapters: dict[str, Any], alpha: float) -> dict[str, Any]:
  """Multiplies every `b` by alpha / r; the result is what models take as a collection."""
  flat = flatten_dict(adapters)
  return unflatten_dict(
    {path: x * (alpha / x.shape[-2]) if path[-1] == "b" else x for path, x in flat.items()}
  )


def stack_layers(
  layers: Mapping[str, tuple[np.ndarray, np.ndarray]], entries: Sequence[Entry]
) -> dict[str, Any]:
  """The float32 adapter tree of single layers' adapters.

  Layers of a stack have one rank: zeros fill up smaller ones, and are all that a layer without an
  adapter has.

  Args:
    layers: (a [in, r], b [r, out]) by the checkpoint's module name.
    entries: see `dense_entries`; all modules are among them.
  """
  flat = {}
  for entry in entries:
    names = module_names(entry)
    rank = max((layers[name][0].shape[1] for name in names if name in layers), default=0)
    if not rank:
      continue
    outputs, inputs = entry.shape
    a = np.zeros((len(names), inputs, rank), np.float32)
    b = np.zeros((len(names), rank, outputs), np.float32)
    for i, name in enumerate(names):
      if name in layers:
        down, up = layers[name]
        a[i, :, : down.shape[1]], b[i, : len(up)] = down, up
    for part, array in (("a", a), ("b", b)):
      flat[(*entry.path[:-1], part)] = jnp.asarray(array if entry.stacked else array[0])
  return unflatten_dict(flat)


def stack_adapters(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
  """One adapter tree that adds what both add; ranks add up where both have an entry.

  Scales must be folded in: `a1 b1 + a2 b2 = [a1 a2] [b1; b2]`.
  """
  out, more = flatten_dict(first), flatten_dict(second)
  axis = {"a": -1, "b": -2}
  for path, leaf in more.items():
    known = path in out
    out[path] = jnp.concatenate([out[path], leaf], axis[path[-1]]) if known else leaf
  return unflatten_dict(out)


def equal_ranks(adapters: dict[str, Any]) -> tuple[dict[str, Any], int]:
  """The same adapters with one rank, zeros filling up the smaller ones, and that rank."""
  flat = flatten_dict(adapters)
  rank = max(leaf.shape[-1] for path, leaf in flat.items() if path[-1] == "a")

  def fill(path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
    axis = leaf.ndim + (-1 if path[-1] == "a" else -2)
    widths = [(0, rank - n if i == axis else 0) for i, n in enumerate(leaf.shape)]
    return jnp.pad(leaf, widths)

  return unflatten_dict({path: fill(path, leaf) for path, leaf in flat.items()}), rank


def merge(params: dict[str, Any], adapters: dict[str, Any], alpha: float) -> dict[str, Any]:
  """Adds adapters to their kernels: `kernel + (alpha / r) a b`.

  Product and sum are float32 with one rounding to the kernel's type at the end (the published code
  rounds the product first). The other leaves are shared with `params`.

  Raises:
    ValueError: an adapter without a kernel, or of another shape, or an int8 kernel.
  """
  flat, parts = flatten_dict(params), flatten_dict(adapters)
  for path in [p for p in parts if p[-1] == "a"]:
    module = path[:-1]
    a, b = parts[path], parts[(*module, "b")]
    kernel = flat.get((*module, "kernel"))
    shape = (*a.shape[:-1], b.shape[-1])
    if kernel is None or kernel.shape != shape or kernel.dtype == jnp.int8:
      raise ValueError(f"adapter {'.'.join(module)} has no floating-point kernel of shape {shape}")
    delta = jnp.matmul(
      a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    merged = kernel.astype(jnp.float32) + (alpha / a.shape[-1]) * delta
    flat[(*module, "kernel")] = merged.astype(kernel.dtype)
  return unflatten_dict(flat)
