"""Runs both stages of a small SD3 on a mesh; a script, because the devices are set at start.

`python tests/support/sharded_run.py DEVICES STEPS OUT DATA,FSDP,TENSOR ...`; 1,1,1 is one device
without a mesh. DEVICES are those of a process; the environment may join several, of which 0 writes.
"""

import os
import sys

from tests.support.xla_flags import xla_flags

os.environ["XLA_FLAGS"] = xla_flags(sys.argv[1])

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.adapters.lora import build_adapters
from rtdmd_jax.algo.schedules import sd3_sigmas
from rtdmd_jax.models import build_transformer
from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.runtime import distributed, multihost, sharding
from rtdmd_jax.training.latent_rewards import LatentRewards
from rtdmd_jax.training.optim import Optimizers, make_optimizer
from rtdmd_jax.training.settings import DMDConfig, OptimizerConfig, PolicyConfig
from rtdmd_jax.training.stage1 import Stage1
from rtdmd_jax.training.stage2 import Stage2
from rtdmd_jax.training.state import Batch, Frozen, Roles, TrainState

SHAPE, PROMPTS, REPEATS = (4, 4, 4), 4, 8
MODEL = {
  "_class_name": "SD3Transformer2DModel", "sample_size": 4, "patch_size": 2, "in_channels": 4,
  "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
  "caption_projection_dim": 32, "joint_attention_dim": 16, "pooled_projection_dim": 16,
  "pos_embed_max_size": 4, "qk_norm": "rms_norm",
}  # fmt: skip
TARGETS = ("attn.to_q", "attn.to_v", "attn.to_out.0", "attn.add_k_proj")


def setup():
  """Everything a step reads, on the current mesh; the same values on every mesh."""
  transformer = build_transformer(MODEL)
  base = jax.tree.map(np.asarray, transformer.init(jax.random.key(0)))
  # Gates and the last layer start at zero, where no adapter would get a gradient.
  rng = np.random.default_rng(0)
  base = jax.tree.map(
    lambda a: a if a.any() else rng.normal(size=a.shape, scale=0.1).astype(np.float32), base
  )

  def make(key):
    return build_adapters(
      transformer.init_abstract(), transformer.table, TARGETS, rank=4, key=key, init="gaussian"
    )

  optimizer = make_optimizer(OptimizerConfig(1e-3, eps=1e-6))

  def initial():
    generator, fake = make(jax.random.key(1)), make(jax.random.key(2))
    opt = optimizer.init
    zero = jnp.zeros((), jnp.int32)
    return sharding.constrain_by_rules(
      TrainState(zero, generator, fake, generator, opt(generator), opt(fake))
    )

  tokens = rng.normal(size=(PROMPTS, 5, 16)).astype(np.float32)
  pooled = rng.normal(size=(PROMPTS, 16)).astype(np.float32)
  batch = Batch(
    Conditioning(tokens, pooled),
    np.repeat(np.arange(PROMPTS), REPEATS),
    np.arange(PROMPTS * REPEATS, dtype=np.uint32),
    Conditioning(np.zeros((1, 5, 16), np.float32), np.zeros((1, 16), np.float32)),
    {"bright": np.ones((PROMPTS, 1), np.float32)},
  )
  sigmas = jnp.append(jnp.asarray(sd3_sigmas([1000, 750, 500, 250], shift=3.0)), 0.0)
  roles = Roles(transformer.apply, "base", "base", "base", 8.0, sigmas, SHAPE)
  frozen = Frozen(
    {"base": sharding.shard(base)}, {}, {}, {}, sharding.replicate({"bright": np.float32(0.5)})
  )
  return roles, frozen, jax.jit(initial)(), sharding.replicate(batch), optimizer


def scoring():
  return LatentRewards(
    decode=lambda params, latents: jax.nn.sigmoid(latents),
    device={"bright": lambda p, images, text: p * images.mean((1, 2, 3)) * text[:, 0]},
    weights={"bright": 1.0},
    differentiable=("bright",),
  )


def stages():
  """The first state, and each stage's compiled programs of (state, key), on the current mesh."""
  roles, frozen, first, batch, optimizer = setup()
  fixed = {"roles": roles, "dmd": DMDConfig(), "optimizers": Optimizers(optimizer, optimizer)}
  one = Stage1(**fixed)
  two = Stage2(**fixed, policy=PolicyConfig(micro_batches=2), rewards=scoring())

  def epoch(state, frozen, batch, key):
    keys = jax.random.split(key, 3)
    samples = two.collect_rollout(state, frozen, batch, keys[0])
    state, a = two.fake_score_step(state, frozen, batch, samples, keys[1])
    state, b = two.policy_step(state, frozen, batch, samples, samples.rewards, keys[2])
    return state, a | b

  def pinned(step):
    def wrapped(state, frozen, batch, key):
      state, metrics = step(state, frozen, batch, key)
      return sharding.constrain_by_rules(state), metrics

    program = jax.jit(wrapped)
    # Arrays of several processes are arguments; a program may not hold them.
    return lambda state, key: program(state, frozen, batch, key)

  return first, {
    "stage1": [pinned(one.fake_score_step), pinned(one.generator_step)],
    "stage2": [pinned(epoch)],
  }


def advance(programs, state, number):
  """Step `number` of a stage: the new state and the metrics of its programs."""
  metrics = {}
  for i, program in enumerate(programs):
    key = jax.random.fold_in(jax.random.key(i), number)
    state, found = program(state, key)
    metrics |= found
  return state, metrics


def values(state, role):
  """All adapters of a role in one array."""
  return np.concatenate(
    [a.ravel() for a in jax.tree.leaves(sharding.to_numpy(getattr(state, role)))]
  )


def run(steps):
  """Losses of every step and the parameters after the last one, of both stages."""
  out = {}
  first, programs = stages()
  for stage in programs:
    state = first
    for number in range(steps):
      state, metrics = advance(programs[stage], state, number)
      for name, value in metrics.items():
        if name.startswith(("loss/", "reward/")):
          out.setdefault(f"{stage}/{name}", []).append(float(value))
    for role in ("generator", "fake_score"):
      out[f"{stage}/params/{role}"] = values(state, role)
    sizes = {a.sharding.shard_shape(a.shape) != a.shape for a in jax.tree.leaves(state.generator)}
    out[f"{stage}/split"] = np.array([True in sizes])
  return out


def on(mesh):
  """The context of a mesh DATA,FSDP,TENSOR over as many of the devices; none over one device."""
  sizes = [int(size) for size in mesh.split(",")]
  devices = jax.devices()[: math.prod(sizes)]
  if len(devices) == 1:
    return contextlib.nullcontext()
  return jax.set_mesh(sharding.make_mesh(*sizes, devices))


if __name__ == "__main__":
  distributed.initialize()
  for mesh in sys.argv[4:]:
    with on(mesh):
      out = run(int(sys.argv[2]))
    if multihost.is_main():
      np.savez(f"{sys.argv[3]}/{mesh}.npz", **out)
