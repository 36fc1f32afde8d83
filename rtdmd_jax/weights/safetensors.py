"""Strict, streaming reading and writing of safetensors checkpoints.

Files are the ones that diffusers and transformers write: one `*.safetensors`, or shards with an
index. Every key must be accounted for, in both directions.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime import sharding as sharding_table
from rtdmd_jax.runtime.files import save_tensors
from rtdmd_jax.weights import headers, int8
from rtdmd_jax.weights.directory import read_config as read_config  # importable from here, too
from rtdmd_jax.weights.directory import weight_files
from rtdmd_jax.weights.key_table import Entry, KeyTable
from rtdmd_jax.weights.recognize import quantised, recognized
from rtdmd_jax.weights.tensors import Array, Tensor, copy_rows

_WANTED = "give floating-point weights: float32, bfloat16, float16 or unscaled float8"
_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U8": np.uint8,
  "BOOL": np.bool_,
}


def load_params(
  path: str | os.PathLike,
  abstract_params: Any,
  table: KeyTable,
  *,
  dtype: Any = None,
  sharding: Any = None,
  ignore: Sequence[str] = (),
) -> Any:
  """Reads a checkpoint into a parameter tree, one tensor at a time.

  Args:
    path: a `.safetensors` file or a directory that diffusers or transformers wrote.
    abstract_params: nested dicts of leaves with `shape` and `dtype` (from `jax.eval_shape`); dense
      kernels may be int8 (`int8.int8_shapes`).
    table: maps leaves to checkpoint keys.
    dtype: type of the floating-point leaves; None takes the type of the abstract leaf.
    sharding: one sharding for all leaves or a tree of them; None follows the sharding table on
      the current mesh, or without one jax's default device. Host memory holds one leaf and 16 MB
      at a time.
    ignore: regular expressions; a whole key that matches one may stay unread.

  Returns:
    A tree of jax arrays with the structure of `abstract_params`.

  Raises:
    UserError: missing or broken file; unknown, missing, duplicate or mis-shaped key; quantised
      weights.
  """
  with _open_files(weight_files(path)) as tensors:
    return _build(path, tensors, abstract_params, table, dtype, sharding, ignore)


def params_from_tensors(
  tensors: Mapping[str, np.ndarray],
  abstract_params: Any,
  table: KeyTable,
  *,
  source: str | os.PathLike,
  dtype: Any = None,
  sharding: Any = None,
  ignore: Sequence[str] = (),
) -> Any:
  """`load_params` of tensors that are at hand already, such as views of a PyTorch file.

  Args:
    tensors: by checkpoint key.
    abstract_params: see `load_params`, as for the rest.
    table: maps leaves to the keys.
    source: where the tensors are from, for error messages.
    dtype: type of the floating-point leaves.
    sharding: where leaves go.
    ignore: keys that may stay unread.

  Raises:
    UserError: unknown, missing or mis-shaped key.
  """
  arrays = {key: Array(source, tensor) for key, tensor in tensors.items()}
  return _build(source, arrays, abstract_params, table, dtype, sharding, ignore)


def _build(
  path: str | os.PathLike,
  tensors: Mapping[str, Tensor | Array],
  abstract_params: Any,
  table: KeyTable,
  dtype: Any,
  sharding: Any,
  ignore: Sequence[str],
) -> Any:
  # A scale has no tensor: it is made of its kernel's.
  shapes = flatten_dict(abstract_params)
  entries = table.entries(
    unflatten_dict({path: leaf for path, leaf in shapes.items() if path[-1] != int8.SCALE})
  )
  mesh = sharding_table.current()
  if sharding is None and mesh is not None:
    sharding = sharding_table.shardings(abstract_params, mesh)
  if sharding is None or isinstance(sharding, jax.sharding.Sharding):
    places = dict.fromkeys(shapes, sharding)
  else:
    places = flatten_dict(sharding)
  _check_keys(path, entries, shapes, tensors, ignore)
  if headers.wanted():
    # Scales stay float32, as `_load` makes them.
    own = {path: None if path[-1] == int8.SCALE else dtype for path in shapes}
    return headers.shapes_of(shapes, lambda path, a: _leaf_dtype(a.dtype, own[path]))
  loaded = {}
  for entry in entries:
    loaded |= _load(entry, shapes, tensors, dtype, places)
  return unflatten_dict(loaded)


def save_params(
  path: str | os.PathLike, params: Any, table: KeyTable, *, dtype: Any = None
) -> None:
  """Writes a parameter tree as one `.safetensors` file in the checkpoint's own layout.

  Args:
    path: the file to write; its directory is made if need be, and the file appears whole or not.
    params: nested dicts of arrays, all addressable from this process.
    table: maps leaves to checkpoint keys.
    dtype: type of the floating-point tensors; None keeps the type of each leaf.
  """
  tensors = {}
  for entry, leaf in zip(table.entries(params), jax.tree.leaves(params), strict=True):
    array = np.asarray(leaf)
    array = array.astype(_leaf_dtype(array.dtype, dtype), copy=False)
    layers = array if entry.stacked else array[None]
    for key, layer in zip(entry.keys, layers, strict=True):
      # safetensors writes the buffer as it lies in memory, so transposed views must be copied.
      tensors[key] = np.asarray(layer.transpose(entry.axes), order="C")
  save_tensors(path, tensors)


def save_model(
  file: str | os.PathLike,
  config: Mapping[str, Any],
  params: Any,
  table: KeyTable,
  *,
  dtype: Any = None,
) -> None:
  """Writes a model directory: `config.json` beside the weights.

  Args:
    file: the `.safetensors` file of the directory, named as its readers expect.
    config: contents of config.json.
    params: see `save_params`, as for the rest.
    table: maps leaves to checkpoint keys.
    dtype: type of the floating-point tensors.
  """
  save_params(file, params, table, dtype=dtype)
  (Path(file).parent / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def checkpoint_keys(path: str | os.PathLike) -> frozenset[str]:
  """The keys of a checkpoint, for families that several key tables describe.

  Args:
    path: a `.safetensors` file or a directory, as for `load_params`.

  Raises:
    UserError: missing or broken file, or a duplicate key.
  """
  with _open_files(weight_files(path)) as tensors:
    return frozenset(tensors)


def checkpoint_dtype(path: str | os.PathLike) -> np.dtype:
  """The one type of a checkpoint's floating-point tensors, to write such weights again in.

  Args:
    path: a `.safetensors` file or a directory, as for `load_params`.

  Raises:
    UserError: missing or broken file, no or several such types, or float8, which would round
      away what is added to the weights.
  """
  with _open_files(weight_files(path)) as tensors:
    types = {t.dtype for t in tensors.values() if jnp.issubdtype(t.dtype, jnp.floating)}
  if len(types) != 1 or any(t.itemsize < 2 for t in types):
    listed = ", ".join(sorted(t.name for t in types)) or "none"
    raise UserError(f"{path} has floating-point types {listed}; say which one to use.")
  return types.pop()


def read_tensors(file: str | os.PathLike) -> dict[str, np.ndarray]:
  """Every tensor of one safetensors file by its key, in its own type (float8 too).

  Raises:
    UserError: missing or broken file, or a type that is not supported.
  """
  with _open_files({Path(file): frozenset()}) as tensors:
    return {key: tensor.read() for key, tensor in tensors.items()}


@contextmanager
def _open_files(files: Mapping[Path, frozenset[str]]) -> Iterator[dict[str, Tensor]]:
  tensors: dict[str, Tensor] = {}
  with ExitStack() as stack:
    for file, promised in files.items():
      read = _tensors_of(file, stack)
      if promised - read.keys():
        lacking = sorted(promised - read.keys())[0]
        raise UserError(f"{file} lacks key {lacking}, although the index promises it there.")
      for key in read.keys() & tensors.keys():
        raise UserError(f"{file} holds key {key} again; {tensors[key].file} has it already.")
      tensors |= read
    yield tensors


def _tensors_of(file: Path, stack: ExitStack) -> dict[str, Tensor]:
  """The tensors of a file that stays open as long as `stack`."""
  try:
    with safe_open(file, framework="numpy"):  # checks the header against the file's length
      pass
    stream = stack.enter_context(file.open("rb"))
  except (SafetensorError, OSError) as error:
    raise UserError(f"{file} is not a whole safetensors file ({error}).") from error
  length = int.from_bytes(stream.read(8), "little")
  header = json.loads(stream.read(length))
  header.pop("__metadata__", None)
  tensors = {}
  for key, value in header.items():
    if value["dtype"] not in _DTYPES:
      raise UserError(f"{file}: tensor {key} has type {value['dtype']}, which is not supported.")
    dtype = np.dtype(_DTYPES[value["dtype"]])
    offset = 8 + length + value["data_offsets"][0]
    tensors[key] = Tensor(file, stream, dtype, tuple(value["shape"]), offset)
  return tensors


def _check_keys(
  path: str | os.PathLike,
  entries: Sequence[Entry],
  shapes: Mapping[tuple[str, ...], Any],
  tensors: Mapping[str, Tensor | Array],
  ignore: Sequence[str],
) -> None:
  wanted = {key: entry for entry in entries for key in entry.keys}
  missing = sorted(wanted.keys() - tensors.keys())
  unknown = sorted(
    key for key in tensors.keys() - wanted.keys() if not any(re.fullmatch(p, key) for p in ignore)
  )
  if sign := quantised(unknown):
    key, words = sign
    raise UserError(f"{tensors[key].file} holds {key}, a part of {words}; {_WANTED}.")
  if missing:
    more = f" and {len(missing) - 1} more keys" if len(missing) > 1 else ""
    # Where it has other keys instead, it is probably another model altogether.
    what = recognized(tensors) if unknown else ""
    raise UserError(f"{path} lacks key {missing[0]}{more}{what}.")
  if unknown:
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    raise UserError(
      f"{tensors[unknown[0]].file} holds key {unknown[0]}{more}, unknown to the model."
    )
  for key, entry in wanted.items():
    tensor = tensors[key]
    if tensor.shape != entry.shape:
      raise UserError(f"{tensor.file}: {key} has shape {tensor.shape}, expected {entry.shape}.")
    # Of an int8 kernel the file has floating-point weights, too.
    leaf = shapes[entry.path].dtype
    whole = jnp.issubdtype(leaf, jnp.integer) and (*entry.path[:-1], int8.SCALE) not in shapes
    if whole == jnp.issubdtype(tensor.dtype, jnp.floating):
      kind = "whole numbers are meant" if whole else _WANTED
      raise UserError(f"{tensor.file}: {key} has type {tensor.dtype.name}; {kind}.")


def _leaf_dtype(own: Any, wanted: Any) -> np.dtype:
  if wanted is None or not jnp.issubdtype(own, jnp.floating):
    return np.dtype(own)
  return np.dtype(wanted)


def _load(
  entry: Entry,
  shapes: Mapping[tuple[str, ...], Any],
  tensors: Mapping[str, Tensor | Array],
  dtype: Any,
  places: Mapping[tuple[str, ...], Any],
) -> dict[tuple[str, ...], jax.Array]:
  """The leaf of an entry by its path, and with an int8 kernel its scales; on the devices."""
  leaf, scale = shapes[entry.path], (*entry.path[:-1], int8.SCALE)
  if entry.dense and scale in shapes:
    arrays = dict(zip((entry.path, scale), _read_int8(entry, leaf, tensors), strict=True))
  else:
    arrays = {entry.path: _read_leaf(entry, leaf, tensors, _leaf_dtype(leaf.dtype, dtype))}
  # A transfer that is still under way would keep its leaf in host memory.
  return {
    path: jax.block_until_ready(sharding_table.device_put(array, places[path]))
    for path, array in arrays.items()
  }


def _read_leaf(
  entry: Entry, leaf: Any, tensors: Mapping[str, Tensor | Array], dtype: np.dtype
) -> np.ndarray:
  out = np.empty(leaf.shape, dtype)
  layers = out if entry.stacked else out[None]
  for i, key in enumerate(entry.keys):
    # A view of the layer with the checkpoint's axes (`...` keeps a scalar a view): one copy does
    # the transposition, the cast and the stacking.
    copy_rows(tensors[key], layers[i, ...].transpose(entry.axes))
  return out


def _read_int8(
  entry: Entry, leaf: Any, tensors: Mapping[str, Tensor | Array]
) -> tuple[np.ndarray, np.ndarray]:
  """A dense kernel's int8 values and scales; of floating-point copies there is one layer."""
  layers = [len(entry.keys)] if entry.stacked else []
  values = np.empty(leaf.shape, np.int8)
  scales = np.empty((*layers, leaf.shape[-1]), np.float32)
  kernel = np.empty(leaf.shape[-2:], np.float32)
  for i, key in enumerate(entry.keys):
    copy_rows(tensors[key], kernel.transpose(entry.axes))
    at = i if entry.stacked else ...
    values[at], scales[at] = int8.quantise(kernel)
  return values, scales
