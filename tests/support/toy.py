"""A backbone of one dense layer, small enough to check steps by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.training.latent_rewards import LatentRewards
from rtdmd_jax.training.optim import make_optimizer
from rtdmd_jax.training.settings import OptimizerConfig
from rtdmd_jax.training.state import Batch, Frozen, Roles, TrainState

SHAPE = (2, 2, 3)
RANK = 2


def apply(variables, x, sigma, tokens, pooled, guidance):
  """`tanh(x (W + sum of adapters)) + text + sigma`."""
  kernel = variables["params"]["kernel"]
  for name in ("lora_frozen", "lora"):
    if name in variables:
      kernel = kernel + variables[name]["a"] @ variables[name]["b"]
  text = tokens.mean(axis=1)[:, None, None, :]
  return jnp.tanh(x @ kernel) + text + 0.3 * sigma[:, None, None, None]


def roles(sigmas=(1.0, 0.9, 0.75, 0.5, 0.0)):
  return Roles(apply, "base", "base", "base", 2.0 * RANK, jnp.array(sigmas), SHAPE)


def adapters(seed):
  keys = jax.random.split(jax.random.key(seed), 2)
  return {
    "a": jax.random.normal(keys[0], (3, RANK)),
    "b": 0.3 * jax.random.normal(keys[1], (RANK, 3)),
  }


def frozen():
  kernel = jax.random.normal(jax.random.key(0), (3, 3))
  return Frozen({"base": {"kernel": kernel}}, {}, {}, {}, {"bright": jnp.float32(0.5)})


def state(learning_rate=1e-2):
  optimizer = make_optimizer(OptimizerConfig(learning_rate))
  generator, fake = adapters(1), adapters(2)
  new = TrainState(
    jnp.zeros((), jnp.int32), generator, fake, generator, optimizer.init(generator),
    optimizer.init(fake),
  )  # fmt: skip
  return new, optimizer


def batch(prompts=3, images_per_prompt=4):
  tokens = jax.random.normal(jax.random.key(5), (prompts, 4, 3))
  conditioning = Conditioning(tokens, None)
  index = jnp.repeat(jnp.arange(prompts), images_per_prompt)
  empty = Conditioning(jnp.zeros((1, 4, 3)), None)
  sample = jnp.arange(prompts * images_per_prompt, dtype=jnp.uint32)
  return Batch(conditioning, index, sample, empty, {"bright": jnp.ones((prompts, 1))})


def scoring(differentiable=("bright",)):
  """One reward on the device (brightness) and one from the host."""
  return LatentRewards(
    decode=lambda params, latents: jax.nn.sigmoid(latents),
    device={"bright": lambda p, images, text: p * images.mean((1, 2, 3)) * text[:, 0]},
    weights={"bright": 1.0, "host": 0.5},
    differentiable=differentiable,
  )


def host_rewards(count, seed=0):
  return {"host": jnp.asarray(np.random.default_rng(seed).normal(size=count), jnp.float32)}
