"""Times the compilation of an image decoder and of other parts for a TPU that is not there.

  python -m benchmarks.compile_parts v6e:1x1

The autoencoder of SD3 and FLUX.1, one image of 512 px, and the patch embedding of a ViT-H/14; in
bfloat16, for one device. Needs libtpu. Processor seconds are those of all threads. Cycles are what
libtpu expects of fused operations, loops multiplied out.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rtdmd_jax.aot.compile import get_devices
from rtdmd_jax.aot.hlo import traffic
from rtdmd_jax.models.convolution import convolve, convolve_blocks
from rtdmd_jax.models.vae import Decoder, MidAttention, ResnetBlock, VAEConfig
from rtdmd_jax.runtime import sharding

CONFIG = VAEConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16)
DTYPE = jnp.bfloat16


def _convolution(width: int, size: int = 3, **options) -> nn.Module:
  return nn.Conv(width, (size, size), dtype=DTYPE, **options)


def _in_blocks(x, kernel, strides, padding, **options):
  return convolve_blocks(x, kernel, 16)


def _blocks(width: int) -> nn.Module:
  return _convolution(width, padding=1, conv_general_dilated=_in_blocks)


def _block(width: int) -> nn.Module:
  return ResnetBlock(width, CONFIG, DTYPE)


_PATCHES = dict(strides=14, padding=0, use_bias=False)
HEAD = "part", "input", "s", "of processors", "code MB", "traffic GB", "Mcycles"
# Name, module, side and channels of its input.
PARTS = (
  ("convolution as a whole", _convolution(512), 64, 512),
  ("convolution in blocks", _blocks(512), 64, 512),
  ("convolution as a whole", _convolution(512), 128, 512),
  ("convolution in blocks", _blocks(512), 128, 512),
  ("convolution as a whole", _convolution(128), 512, 128),
  ("convolution in blocks", _blocks(128), 512, 128),
  ("attention", MidAttention(CONFIG, DTYPE), 64, 512),
  ("residual block", _block(512), 64, 512),
  ("residual block", _block(512), 128, 512),
  ("residual block", _block(256), 256, 256),
  ("residual block", _block(128), 512, 128),
  ("decoder", Decoder(CONFIG, DTYPE), 64, 16),
  ("decoder, forward and back", Decoder(CONFIG, DTYPE, "full"), 64, 16),
  ("patches by a convolution, forward and back", _convolution(1280, 14, **_PATCHES), 224, 3),
  (
    "patches by a product, forward and back",
    _convolution(1280, 14, conv_general_dilated=convolve, **_PATCHES),
    224,
    3,
  ),
)


def back(function: Callable, params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The result and a gradient by x, as a reward's is taken."""
  out, pullback = jax.vjp(lambda x: function(params, x), x)
  return out, *pullback(out)


def cost(function: Callable, *shapes) -> tuple[str, ...]:
  """A row's cells but part and input."""
  lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",))
  wall, processor = time.perf_counter(), time.process_time()
  compiled = lowered.compile()
  wall, processor = time.perf_counter() - wall, time.process_time() - processor
  code, moved = compiled.memory_analysis(), traffic(compiled.as_text())
  return (
    f"{wall:.0f}", f"{processor:.0f}", f"{code.generated_code_size_in_bytes / 1e6:.1f}",
    f"{moved.memory / 1e9:.2f}", f"{moved.cycles / 1e6:.2f}",
  )  # fmt: skip


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("topology", help="of TPUs; the first device is compiled for")
  parser.add_argument("--only", default="", help="parts whose name begins so")
  options = parser.parse_args()
  mesh = sharding.make_mesh(devices=get_devices(options.topology)[1][:1])
  on = jax.sharding.NamedSharding(mesh, PartitionSpec())
  print("|", " | ".join(HEAD), "|\n" + "|---" * len(HEAD) + "|", flush=True)
  for name, module, side, channels in PARTS:
    if not name.startswith(options.only):
      continue
    x = jax.ShapeDtypeStruct((1, side, side, channels), DTYPE, sharding=on)
    params = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, DTYPE, sharding=on),
      jax.eval_shape(module.init, jax.random.key(0), x),
    )
    function = partial(back, module.apply) if name.endswith("back") else module.apply
    with jax.set_mesh(mesh):
      row = name, f"{side} x {side} x {channels}", *cost(function, params, x)
    print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
  main()
