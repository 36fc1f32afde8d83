"""Writes a model directory the way diffusers does: one file, or shards with an index."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rtdmd_jax.runtime.files import save_tensors
from rtdmd_jax.weights.key_table import Entry, KeyTable

STEM = "diffusion_pytorch_model"
# diffusers' limit, decimal.
SHARD_BYTES = 5_000_000_000


def save_sharded(
  directory: str | os.PathLike,
  config: Mapping[str, Any],
  params: Any,
  table: KeyTable,
  *,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes config.json and the weights; host memory holds one shard at a time.

  Args:
    directory: made if need be.
    config: contents of config.json.
    params: nested dicts of arrays, all addressable from this process; types are kept.
    table: maps leaves to checkpoint keys.
    shard_bytes: the most a shard holds, unless one tensor is larger.
  """
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  leaves = jax.tree.leaves(params)
  layers = [
    (entry, leaf, i)
    for entry, leaf in zip(table.entries(params), leaves, strict=True)
    for i in range(len(entry.keys))
  ]
  sizes = [leaf.nbytes // len(entry.keys) for entry, leaf, _ in layers]
  shards = _plan(sizes, shard_bytes)
  weight_map = {}
  for number, members in enumerate(shards, start=1):
    name = f"{STEM}-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else STEM
    tensors = {layers[m][0].keys[layers[m][2]]: _tensor(*layers[m]) for m in members}
    save_tensors(directory / f"{name}.safetensors", tensors)
    weight_map |= dict.fromkeys(tensors, f"{name}.safetensors")
  if len(shards) > 1:
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (directory / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2))
  (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _plan(sizes: list[int], shard_bytes: int) -> list[list[int]]:
  """Consecutive members, so that each shard but an oversized one fits."""
  shards: list[list[int]] = [[]]
  used = 0
  for i, size in enumerate(sizes):
    if shards[-1] and used + size > shard_bytes:
      shards.append([])
      used = 0
    shards[-1].append(i)
    used += size
  return shards


def _tensor(entry: Entry, leaf: Any, layer: int) -> np.ndarray:
  array = np.asarray(leaf[layer] if entry.stacked else leaf)
  # safetensors writes the buffer as it lies in memory, so transposed views must be copied.
  return np.asarray(array.transpose(entry.axes), order="C")
