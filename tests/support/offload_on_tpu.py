"""Prints where the kernels of offloaded bases lie on four TPUs; no test, but run by one.

The program is the adapters' gradient of a small FLUX.2 with full rematerialisation.
"""

import json
import re

import jax
import jax.numpy as jnp
from int8_on_tpu import FLUX2, LAYERS, compiled

from rtdmd_jax.models import build_transformer

HOST = "S(5)"


def main():
  transformer = build_transformer(FLUX2, dtype=jnp.bfloat16, attention="xla", remat="full")
  abstract = transformer.init_abstract()
  base = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16), abstract)
  block = base["single_transformer_blocks"]["attn"]
  kernels = [block[name]["kernel"] for name in ("to_qkv_mlp_proj", "to_out")]
  sizes = {
    tuple(sorted((LAYERS, i // n, o))) for _, i, o in (k.shape for k in kernels) for n in (1, 4)
  }
  out = {"kernels": sum(k.dtype.itemsize * k.size for k in kernels) / 4}
  for offload in (False, True):
    program = compiled(base, transformer, offload=offload)
    arrays = re.findall(r"\b\w+\[([\d,]+)\]\{([^}]*)\}", program.as_text())
    stacks = [
      layout for dims, layout in arrays if tuple(sorted(map(int, dims.split(",")))) in sizes
    ]
    memory = program.memory_analysis()
    out["offloaded" if offload else "resident"] = {
      "on_device": sum(HOST not in layout for layout in stacks),
      "on_host": sum(HOST in layout for layout in stacks),
      "arguments": memory.argument_size_in_bytes,
      "host_arguments": memory.host_argument_size_in_bytes,
    }
  print(json.dumps(out))


if __name__ == "__main__":
  main()
