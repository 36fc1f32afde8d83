"""Peak host memory of loading a checkpoint: python -m benchmarks.load_memory --gigabytes=2

Writes a random sharded FLUX.2 transformer of about that size to a temporary directory, loads it in
a process of its own and compares the peak of resident memory, less what was there before and the
parameters themselves where the device is the host, with the largest leaf (a stack of layers).
Linux only; the exit code is 1 where the peak is more than 110 % of the largest leaf.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from benchmarks import record, tables
from rtdmd_jax.models import build_transformer
from rtdmd_jax.weights.int8 import STORAGES
from rtdmd_jax.weights.safetensors import load_params, read_config

LIMIT = 1.1
# FLUX.2-klein 4B's depth; the width follows from the size.
DEPTH = dict(num_layers=5, num_single_layers=20, attention_head_dim=128, guidance_embeds=False)
TYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def config_of(gigabytes: float, itemsize: int) -> dict:
  """The config whose parameters come nearest."""

  def made(heads: int) -> dict:
    width = 128 * heads
    return dict(
      DEPTH,
      _class_name="Flux2Transformer2DModel",
      num_attention_heads=heads,
      joint_attention_dim=5 * width // 2,
    )

  def error(heads: int) -> float:
    leaves = jax.tree.leaves(build_transformer(made(heads)).init_abstract())
    return abs(itemsize * sum(leaf.size for leaf in leaves) - 1e9 * gigabytes)

  return made(min(range(2, 40, 2), key=error))


def write(directory: Path, config: dict, dtype: type, shard_bytes: int) -> None:
  """Random weights in shards with an index, one shard in memory at a time."""
  transformer = build_transformer(config)
  rng = np.random.default_rng(0)
  weight_map, shard, used = {}, {}, 0

  def flush() -> None:
    name = f"part-{len(set(weight_map.values())):03d}.safetensors"
    save_file(shard, directory / name)
    weight_map.update(dict.fromkeys(shard, name))
    shard.clear()

  for entry in transformer.table.entries(transformer.init_abstract()):
    for key in entry.keys:
      shard[key] = rng.random(entry.shape, np.float32).astype(dtype)
      used += shard[key].nbytes
      if used > shard_bytes:
        flush()
        used = 0
  flush()
  index = {"metadata": {}, "weight_map": weight_map}
  (directory / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
  (directory / "config.json").write_text(json.dumps(config))


def memory(field: str) -> int:
  """`VmRSS` or its peak `VmHWM` of this process, in bytes."""
  for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith(field + ":"):
      return 1024 * int(line.split()[1])
  raise KeyError(field)


def measure(directory: Path, storage: str) -> dict:
  """Loads the checkpoint as bfloat16, its kernels perhaps as int8; all numbers in bytes."""
  transformer = build_transformer(read_config(directory))
  abstract = transformer.stored(transformer.init_abstract(), storage)
  jax.block_until_ready(jnp.zeros(1))
  Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
  before = memory("VmRSS")
  params = load_params(directory, abstract, transformer.table, dtype=jnp.bfloat16)
  peak = memory("VmHWM")
  leaves = jax.tree.leaves(params)
  total = sum(leaf.nbytes for leaf in leaves)
  on_host = jax.default_backend() == "cpu"
  largest = max(leaf.nbytes for leaf in leaves)
  beside = peak - before - (total if on_host else 0)
  return {
    "backend": jax.default_backend(),
    "parameters": total,
    "largest_leaf": largest,
    "before": before,
    "peak": peak,
    "peak_beside_parameters": beside,
    "ratio_to_largest_leaf": round(beside / largest, 3),
  }


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--gigabytes", type=float, default=2.0, help="size on disk")
  parser.add_argument("--stored", choices=TYPES, default="bfloat16", help="type on disk")
  parser.add_argument("--base_storage", choices=STORAGES, default="native")
  parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
  record.add_flag(parser)
  args = parser.parse_args()
  if args.load:
    print(json.dumps(measure(args.load, args.base_storage)))
    return 0
  dtype = TYPES[args.stored]
  with tempfile.TemporaryDirectory() as name:
    directory = Path(name)
    write(directory, config_of(args.gigabytes, np.dtype(dtype).itemsize), dtype, 500_000_000)
    options = [f"--load={directory}", f"--base_storage={args.base_storage}"]
    command = [sys.executable, "-m", "benchmarks.load_memory", *options]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
  row = {
    "bases": args.base_storage, "stored_gb": round(args.gigabytes, 2),
    "largest_leaf_gb": result["largest_leaf"] / 1e9,
    "above_parameters_gb": result["peak_beside_parameters"] / 1e9,
    "ratio_to_largest_leaf": result["ratio_to_largest_leaf"],
  }  # fmt: skip
  tables.report("load_memory", [row], args.save, ("bases", "stored_gb"))
  return int(result["ratio_to_largest_leaf"] > LIMIT)


if __name__ == "__main__":
  sys.exit(main())
