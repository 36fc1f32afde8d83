"""Prints what becomes of int8 kernels in a program for four TPUs; no test, but run by one.

The program is the adapters' gradient of a small FLUX.2 without rematerialisation.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rtdmd_jax.adapters.lora import build_adapters
from rtdmd_jax.aot.topology import find_topology
from rtdmd_jax.models import build_transformer
from rtdmd_jax.runtime import sharding

LAYERS = 6
FLUX2 = {
  "_class_name": "Flux2Transformer2DModel",
  "num_layers": 1,
  "num_single_layers": LAYERS,
  "attention_head_dim": 128,
  "num_attention_heads": 4,
  "joint_attention_dim": 256,
  "in_channels": 64,
  "guidance_embeds": False,
}


def compiled(base, transformer, *, offload=False):
  """The program; `base` has the shapes of the parameters."""
  shapes, key = transformer.init_abstract(), jax.random.key(0)
  adapters = jax.eval_shape(
    lambda: build_adapters(shapes, transformer.table, ["attn.to_out"], rank=4, key=key)
  )
  mesh = Mesh(np.array(find_topology("v5e:2x2").devices).reshape(1, 4, 1), sharding.AXES)
  rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))

  def loss(adapters, base, *inputs):
    return jnp.mean(transformer.apply({"params": base, "lora": adapters}, *inputs) ** 2)

  adapters = sharding.shard_on(adapters, mesh)
  base = sharding.shard_on(base, mesh, offload=offload)
  inputs = [
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
    for shape in ((8, 8, 8, 64), (8,), (8, 32, 256))
  ]
  with jax.set_mesh(mesh):
    return jax.jit(jax.grad(loss)).lower(adapters, base, *inputs).compile()


def types_of(text, kernels):
  """Types of whole or split stacks of kernels, and of kernels that devices gather."""
  sizes = {tuple(sorted((LAYERS, i // n, o))) for i, o in kernels for n in (1, 4)}
  arrays = re.findall(r"\b(\w+)\[([\d,]+)\]", text)
  gathers = re.findall(r"= \(?(\w+)\[([\d,]+)\][^=]*? all-gather(?:-start)?\(", text)

  def shape(dims):
    return tuple(map(int, dims.split(",")))

  return {
    "stacks": sorted({kind for kind, dims in arrays if tuple(sorted(shape(dims))) in sizes}),
    "gathered": sorted({kind for kind, dims in gathers if shape(dims)[-2:] in kernels}),
  }


def main():
  transformer = build_transformer(FLUX2, dtype=jnp.bfloat16, attention="xla")
  base = transformer.stored(transformer.init_abstract(), "int8")
  block = base["single_transformer_blocks"]["attn"]
  kernels = {block[name]["kernel"].shape[1:] for name in ("to_qkv_mlp_proj", "to_out")}
  print(json.dumps(types_of(compiled(base, transformer).as_text(), kernels)))


if __name__ == "__main__":
  main()
