"""The project's own stage steps on laws that are known exactly.

A role is the teacher's exact velocity plus a small MLP, as a network plus its adapter. Latents are
[B, 1, 1, d]; there is one condition, and prompts only say which samples form a group.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.tilt import teachers
from rtdmd_jax.algo.rollout import sample_rollout
from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.training.latent_rewards import LatentRewards
from rtdmd_jax.training.optim import Optimizers, ema_update
from rtdmd_jax.training.settings import DMDConfig, PolicyConfig
from rtdmd_jax.training.stage1 import Stage1
from rtdmd_jax.training.stage2 import Stage2
from rtdmd_jax.training.state import Batch, Frozen, Roles, TrainState
from rtdmd_jax.training.velocities import generator_velocity

# Without the normaliser, distribution matching is the gradient of a divergence, whose minimiser is
# known.
MATCHING = DMDConfig(guidance_low=1.0, guidance_high=1.0, normalize=False)
SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)  # the four steps of the tiny pipeline: even, shifted by 3
EVEN_SIGMAS = (1.0, 0.75, 0.5, 0.25, 0.0)
FREQUENCIES = 2.0 ** np.arange(4)


class Problem(NamedTuple):
  """A teacher and a reward `linear . x - quadratic |x|^2 / 2`."""

  teacher: dict
  linear: np.ndarray
  quadratic: float

  def reward(self, x: np.ndarray) -> np.ndarray:
    """[..., d] -> [...]."""
    return x @ self.linear - 0.5 * self.quadratic * np.square(x).sum(-1)


class Training(NamedTuple):
  """How long and how a stage trains; the rate falls linearly to 0."""

  updates: int
  learning_rate: float = 1e-3
  fake_learning_rate: float = 1e-3
  fake_updates: int = 10
  groups: int = 24
  repeats: int = 16
  ema: float = 0.98
  seed: int = 0
  width: int = 64
  sigmas: tuple[float, ...] = SIGMAS


def init_mlp(key: jax.Array, d: int, width: int) -> dict:
  """Three hidden layers; the last layer starts at 0, so that a role starts as the teacher."""
  sizes = [2 * d + 2 * len(FREQUENCIES), width, width, width, d]
  keys = jax.random.split(key, len(sizes) - 1)
  last = len(sizes) - 2
  return {
    f"layer{i}": {
      "kernel": (i != last) * jax.random.normal(k, (m, n)) * np.sqrt(2 / m),
      "bias": jnp.zeros(n),
    }
    for i, (k, m, n) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
  }


def mlp(params: dict, x: jax.Array, sigma: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
  """Of position and teacher's velocity, x [B, 2 d], at sigma [B]; computed in `dtype`."""
  phase = np.pi / 2 * sigma[:, None] * FREQUENCIES
  h = jnp.concatenate([x, jnp.sin(phase), jnp.cos(phase)], axis=-1).astype(dtype)
  params = jax.tree.map(lambda a: a.astype(dtype), params)
  for i in range(len(params)):
    h = h @ params[f"layer{i}"]["kernel"] + params[f"layer{i}"]["bias"]
    h = jax.nn.silu(h) if i < len(params) - 1 else h
  return h.astype(jnp.float32)


def apply(variables, x, sigma, tokens, pooled, guidance, dtype=jnp.float32):
  """The teacher, plus the MLP in training or else that of the earlier stage, if there is one."""
  flat = x.reshape(x.shape[0], -1)
  v = teachers.velocity(variables["params"], flat, sigma)
  adapter = variables.get("lora", variables.get("lora_frozen"))
  if adapter is not None:
    v = v + mlp(adapter, jnp.concatenate([flat, v], axis=-1), sigma, dtype)
  return v.reshape(x.shape)


def roles(d: int, sigmas: tuple[float, ...] = SIGMAS) -> Roles:
  return Roles(apply, "teacher", "teacher", "teacher", 1.0, jnp.array(sigmas), (1, 1, d))


def frozen(problem: Problem, generator: Any = None, reward_scale: float = 1.0) -> Frozen:
  """Exact teacher, the reward's parameters and, in stage 2, the cold start as the reference."""
  place = {
    "linear": jnp.asarray(reward_scale * problem.linear, jnp.float32),
    "quadratic": jnp.float32(reward_scale * problem.quadratic),
  }
  base = {"teacher": teachers.spectral(problem.teacher)}
  return Frozen(base, {} if generator is None else generator, {}, {}, {"place": place})


def place_reward(params: dict, images: jax.Array, text: jax.Array) -> jax.Array:
  x = images.reshape(images.shape[0], -1)
  return x @ params["linear"] - 0.5 * params["quadratic"] * jnp.square(x).sum(-1)


SCORING = LatentRewards(
  decode=lambda params, latents: latents,
  device={"place": place_reward},
  weights={"place": 1.0},
  differentiable=("place",),
)


def batch(training: Training) -> Batch:
  count = training.groups * training.repeats
  one = Conditioning(jnp.zeros((training.groups, 1, 1)), None)
  index = jnp.arange(count, dtype=jnp.uint32)
  text = {"place": jnp.zeros((training.groups, 1))}
  return Batch(one, jnp.repeat(jnp.arange(training.groups), training.repeats), index, None, text)


def optimizer(learning_rate: float, updates: int) -> optax.GradientTransformation:
  schedule = optax.schedules.linear_schedule(learning_rate, 0.0, updates)
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def optimizers(training: Training) -> Optimizers:
  """Those of the generator and the fake score."""
  return Optimizers(
    optimizer(training.learning_rate, training.updates),
    optimizer(training.fake_learning_rate, training.updates * training.fake_updates),
  )


def _no_update(gradients: Any, last: Any, params: Any = None) -> tuple[Any, Any]:
  return jax.tree.map(jnp.zeros_like, gradients), gradients


# Changes nothing and keeps the gradient as its state, where a step leaves it to be read.
RECORDER = optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), _no_update)


def start(problem: Problem, training: Training, earlier: TrainState | None = None) -> TrainState:
  """Fresh networks, or those of `earlier`, with empty optimizer states."""
  keys = jax.random.split(jax.random.key(training.seed), 2)
  d = problem.linear.shape[0]
  generator, fake = (init_mlp(k, d, training.width) for k in keys)
  if earlier is not None:
    generator, fake = earlier.ema, earlier.fake_score
  first, second = optimizers(training)
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, generator, fake, generator, first.init(generator), second.init(fake))


def _keys(training: Training, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  key = jax.random.fold_in(jax.random.key(training.seed + 1), step)
  return tuple(jax.random.split(key, 3))


def _finish(state: TrainState, training: Training) -> TrainState:
  ema = ema_update(state.ema, state.generator, training.ema)
  return state.replace(step=state.step + 1, ema=ema)


@partial(jax.jit, static_argnames=("training", "config"))
def train_stage1(
  state: TrainState, fixed: Frozen, *, training: Training, config: DMDConfig
) -> TrainState:
  """AC-DMD: `fake_updates` updates of the fake score before each one of the generator."""
  data = batch(training)
  d = fixed.rewards["place"]["linear"].shape[0]
  stage = Stage1(roles(d, training.sigmas), config, optimizers(training))

  def fake(state: TrainState, key: jax.Array) -> tuple[TrainState, None]:
    return stage.fake_score_step(state, fixed, data, key)[0], None

  def update(state: TrainState, _: None) -> tuple[TrainState, None]:
    fake_key, key, _ = _keys(training, state.step)
    state, _ = jax.lax.scan(fake, state, jax.random.split(fake_key, training.fake_updates))
    state, _ = stage.generator_step(state, fixed, data, key)
    return _finish(state, training), None

  return jax.lax.scan(update, state, None, training.updates)[0]


@partial(jax.jit, static_argnames=("training", "config", "policy", "snapshots"))
def train_stage2(
  state: TrainState,
  fixed: Frozen,
  policy_weight: float,
  *,
  training: Training,
  config: DMDConfig,
  policy: PolicyConfig,
  snapshots: int = 1,
) -> tuple[TrainState, Any]:
  """RTDMD; also returns the generator's average at `snapshots` equidistant moments, stacked."""
  data = batch(training)
  d = fixed.rewards["place"]["linear"].shape[0]
  weighted = policy._replace(policy_weight=policy_weight)
  stage = Stage2(roles(d, training.sigmas), config, weighted, SCORING, optimizers(training))

  def update(state: TrainState, _: None) -> tuple[TrainState, None]:
    rollout_key, fake_key, key = _keys(training, state.step)
    samples = stage.collect_rollout(state, fixed, data, rollout_key)

    def fake(state: TrainState, key: jax.Array) -> tuple[TrainState, None]:
      return stage.fake_score_step(state, fixed, data, samples, key)[0], None

    if policy.dmd_weight:
      state, _ = jax.lax.scan(fake, state, jax.random.split(fake_key, training.fake_updates))
    state, _ = stage.policy_step(state, fixed, data, samples, samples.rewards, key)
    return _finish(state, training), None

  def part(state: TrainState, _: None) -> tuple[TrainState, Any]:
    state = jax.lax.scan(update, state, None, training.updates // snapshots)[0]
    return state, state.ema

  return jax.lax.scan(part, state, None, snapshots)


@partial(jax.jit, static_argnames=("count", "sigmas"))
def _path(
  generator: Any, fixed: Frozen, key: jax.Array, count: int, sigmas: tuple[float, ...]
) -> jax.Array:
  d = fixed.rewards["place"]["linear"].shape[0]
  one = Conditioning(jnp.zeros((count, 1, 1)), None)
  velocity: Callable = generator_velocity(roles(d, sigmas), fixed, generator, one)
  keys = jax.random.split(key, 2)
  noise = jax.random.normal(keys[0], (count, 1, 1, d))
  step_noise = jax.random.normal(keys[1], (len(sigmas) - 1, count, 1, 1, d))
  path = sample_rollout(velocity, noise, jnp.array(sigmas), step_noise, eta=DMDConfig().eta)
  return jnp.concatenate([path.x, path.x_next[-1:]]).reshape(len(sigmas), count, d)


def path(
  generator: Any,
  fixed: Frozen,
  count: int = 10_000,
  seed: int = 12345,
  sigmas: tuple[float, ...] = SIGMAS,
) -> np.ndarray:
  """Samples of the few-step generator at every level [K + 1, count, d]; empty for the teacher."""
  return np.asarray(_path(generator, fixed, jax.random.key(seed), count, sigmas), np.float64)
