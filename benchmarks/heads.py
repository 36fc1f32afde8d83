"""Heads by a plain reshape beside heads by whole tiles, for one absent TPU.

  python -m benchmarks.heads configs/flux2_stage1.py v5e:2x4

Compiles the gradient of the fake score's velocity by its adapters, 4 images, kernels and blocks as
in the config, once each way (`rtdmd_jax/models/heads.py`). Cycles are what libtpu expects of fused
operations and copies, loops multiplied out; it has none of the attention kernel.
"""

import argparse
import re
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from rtdmd_jax.aot.abstract import abstract_setup
from rtdmd_jax.aot.compile import get_devices
from rtdmd_jax.aot.hlo import traffic
from rtdmd_jax.config import load_config
from rtdmd_jax.models import heads
from rtdmd_jax.runtime import sharding
from rtdmd_jax.training import stage1
from rtdmd_jax.training.setup import new_adapters

IMAGES = 4
HEAD = (
  "heads", "s", "of processors", "code MB", "temporaries GiB", "traffic TB", "Gcycles", "of copies"
)  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("config", help="of stage 1")
  parser.add_argument("topology", help="of TPUs; the first device is compiled for")
  args = parser.parse_args()
  config = load_config(args.config, [])
  setup = abstract_setup(config)
  mesh = sharding.make_mesh(devices=get_devices(args.topology)[1][:1])
  by_tiles = heads._by_tiles
  print("|", " | ".join(HEAD), "|\n" + "|---" * len(HEAD) + "|", flush=True)
  for name, chosen in (("by a reshape", lambda length, width: False), ("by tiles", by_tiles)):
    heads._by_tiles = chosen
    jax.clear_caches()
    with jax.set_mesh(mesh):
      print("|", " | ".join((name, *measure(config, setup, mesh))), "|", flush=True)


def measure(config, setup, mesh) -> tuple[str, ...]:
  """A row's cells but the first."""

  def loss(adapters, frozen, conditioning, x, sigma):
    velocity = stage1.fake_score_velocity(setup.roles, frozen, adapters, conditioning)
    return jnp.mean(velocity(x, sigma) ** 2)

  def rows(shape):
    return jax.ShapeDtypeStruct((IMAGES, *shape.shape[1:]), shape.dtype)

  shapes = (
    jax.eval_shape(lambda: new_adapters(config, setup.pipeline, jax.random.key(0))),
    setup.frozen.replace(vae=None, rewards={}),
    jax.tree.map(rows, setup.unconditional),
    jax.ShapeDtypeStruct((IMAGES, *setup.roles.latent_shape), jnp.float32),
    jax.ShapeDtypeStruct((IMAGES,), jnp.float32),
  )
  on = NamedSharding(mesh, PartitionSpec())
  placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=on), shapes)
  lowered = jax.jit(jax.grad(loss)).lower(*placed)
  wall, processor = time.perf_counter(), time.process_time()
  compiled = lowered.compile()
  wall, processor = time.perf_counter() - wall, time.process_time() - processor
  sizes, text = compiled.memory_analysis(), compiled.as_text()
  whole = traffic(text)
  rest = traffic(re.sub(r"^(.* copy\(.*)estimated_cycles", r"\1", text, flags=re.M))
  return (
    f"{wall:.0f}", f"{processor:.0f}", f"{sizes.generated_code_size_in_bytes / 1e6:.0f}",
    f"{sizes.temp_size_in_bytes / 2**30:.2f}", f"{whole.memory / 1e12:.3f}",
    f"{whole.cycles / 1e9:.3f}", f"{(whole.cycles - rest.cycles) / 1e9:.3f}",
  )  # fmt: skip


if __name__ == "__main__":
  main()
