"""What int8 kernels change in a velocity: python -m benchmarks.int8_error

Root mean square of the difference to float32 over that of the velocity, along the Euler steps of
the float32 network, for the shipped tiny SD3 pipeline and for a small FLUX.2-klein with random
weights. Beside it bfloat16 alone, and both.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import rtdmd_jax
from benchmarks import record, tables
from rtdmd_jax.models import build_transformer
from rtdmd_jax.pipeline import Pipeline
from rtdmd_jax.weights.safetensors import load_params, read_config, save_params

TINY = Path(rtdmd_jax.__file__).parent / "assets/tiny"
# FLUX.2-klein with fewer and narrower blocks.
KLEIN = {
  "_class_name": "Flux2Transformer2DModel",
  "num_layers": 2,
  "num_single_layers": 6,
  "attention_head_dim": 64,
  "num_attention_heads": 6,
  "joint_attention_dim": 256,
  "in_channels": 64,
  "guidance_embeds": False,
  "axes_dims_rope": [16, 16, 16, 16],
}
SIGMAS = np.linspace(1, 0, 9)
COLUMNS = (("bfloat16", "native"), ("float32", "int8"), ("bfloat16", "int8"))


def errors(config, source, inputs, latents):
  """[SIGMAS - 1, COLUMNS] relative errors; `inputs` are tokens and pooled."""

  def network(dtype, storage):
    transformer = build_transformer(config, dtype=dtype)
    shapes = transformer.stored(transformer.init_abstract(), storage)
    params = load_params(source, shapes, transformer.table, dtype=dtype)
    velocity = jax.jit(transformer.velocity)
    return lambda x, sigma: velocity(params, x, jnp.full(len(x), sigma, jnp.float32), *inputs)

  exact = network("float32", "native")
  others = [network(*column) for column in COLUMNS]
  rows = []
  for sigma, after in zip(SIGMAS[:-1], SIGMAS[1:], strict=True):
    v = exact(latents, sigma)
    rows.append([rms(other(latents, sigma) - v) / rms(v) for other in others])
    latents += (after - sigma) * v
  return np.array(rows)


def rms(x):
  return float(jnp.sqrt(jnp.mean(x**2)))


def tiny():
  pipeline = Pipeline.from_pretrained(TINY)
  encoded = pipeline.encode(["a photo of a red circle", "two blue squares", "a green triangle"])
  latents = jax.random.normal(jax.random.key(0), (3, *pipeline.latent_shape(64)))
  source = TINY / "transformer"
  return errors(read_config(source), source, (encoded.tokens, encoded.pooled), latents)


def klein():
  """Weights of variance 1 / fan-in, so that every layer keeps its input's size."""
  transformer = build_transformer(KLEIN)
  keys = iter(jax.random.split(jax.random.key(0), 100))
  params = jax.tree.map(
    lambda s: jax.random.normal(next(keys), s.shape) / s.shape[-2:][0] ** 0.5,
    transformer.init_abstract(),
  )
  tokens = jax.random.normal(next(keys), (2, 32, KLEIN["joint_attention_dim"]))
  latents = jax.random.normal(next(keys), (2, 8, 8, KLEIN["in_channels"]))
  with tempfile.TemporaryDirectory() as directory:
    file = Path(directory) / "model.safetensors"
    save_params(file, params, transformer.table)
    return errors(KLEIN, file, (tokens,), latents)


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  record.add_flag(parser)
  options = parser.parse_args()
  rows = []
  for name, measure in (("tiny SD3 pipeline", tiny), ("small random FLUX.2-klein", klein)):
    errors, row = measure(), {"network": name}
    for key, column in zip(("bfloat16", "int8", "both"), errors.T, strict=True):
      row |= {key: float(column.mean()), f"{key}_largest": float(column.max())}
    rows.append(row)
  tables.report("int8_error", rows, options.save)


if __name__ == "__main__":
  main()
