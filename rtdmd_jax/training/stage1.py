"""Stage 1, AC-DMD: the two steps of the cold start (arXiv 2605.26108, section 3.1).

A batch is `Batch` below; a step is a pure function of (state, frozen, batch, key) that returns the
new state and metrics.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from rtdmd_jax.algo import losses, timesteps
from rtdmd_jax.algo.rollout import LastStep, Velocity, generator_rollout, subinterval_start
from rtdmd_jax.algo.subgrpo import sample_noise
from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.pipeline.velocity import role_variables, role_velocity, scale_adapters
from rtdmd_jax.training.micro_batching import accumulated_grad
from rtdmd_jax.training.optim import guarded_update
from rtdmd_jax.training.settings import DMDConfig
from rtdmd_jax.training.state import Batch, Frozen, Metrics, Roles, TrainState

Tree = Any


def generator_velocity(
  roles: Roles, frozen: Frozen, adapters: Tree, conditioning: Conditioning
) -> Velocity:
  """The generator: never guided."""
  return _student_velocity(
    roles, frozen.bases[roles.generator], frozen.generator, adapters, conditioning
  )


def fake_score_velocity(
  roles: Roles, frozen: Frozen, adapters: Tree, conditioning: Conditioning
) -> Velocity:
  """The fake score: conditional, never guided."""
  return _student_velocity(
    roles, frozen.bases[roles.fake_score], frozen.fake_score, adapters, conditioning
  )


def _student_velocity(
  roles: Roles, base: Tree, earlier: Tree, adapters: Tree, conditioning: Conditioning
) -> Velocity:
  """A base with the adapters of an earlier stage and those in training."""
  variables = role_variables(base, earlier, scale_adapters(adapters, roles.adapter_scale))
  return role_velocity(
    roles.apply, variables, conditioning, embedded_guidance=roles.embedded_guidance
  )


def teacher_velocity(
  roles: Roles,
  frozen: Frozen,
  config: DMDConfig,
  conditioning: Conditioning,
  unconditional: Conditioning | None,
  key: jax.Array,
) -> Velocity:
  """The teacher, with one guidance scale drawn for the whole global batch."""
  guided = config.guidance_high > 1.0 or roles.embedded_guidance
  return role_velocity(
    roles.apply,
    role_variables(frozen.bases[roles.teacher]),
    conditioning,
    unconditional=unconditional if guided else None,
    guidance=timesteps.guidance_scale(key, config.guidance_low, config.guidance_high),
    embedded_guidance=roles.embedded_guidance,
  )


def sample_last_step(
  velocity: Velocity,
  roles: Roles,
  config: DMDConfig,
  sample_index: jax.Array,
  key: jax.Array,
  *,
  differentiable: bool = True,
) -> LastStep:
  """The generator from noise to a random stop, one stop for the whole global batch."""
  noise_key, step_key, stop_key = jax.random.split(key, 3)
  steps = roles.sigmas.shape[0] - 1
  noise = sample_noise(noise_key, sample_index, roles.latent_shape)
  step_noise = jnp.stack(
    [
      sample_noise(jax.random.fold_in(step_key, i), sample_index, roles.latent_shape)
      for i in range(steps)
    ]
  )
  stop = timesteps.random_stop(stop_key, steps)
  return generator_rollout(
    velocity, noise, roles.sigmas, step_noise,
    eta=config.eta, stop=stop, differentiable=differentiable,
  )  # fmt: skip


def start_of_interval(
  last: LastStep, roles: Roles, config: DMDConfig, sample_index: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(x_s, sigma_s) of AC-DMD; for plain DMD the clean prediction at level 0."""
  if config.objective == "dmd":
    return last.x0, jnp.zeros(())
  return subinterval_start(
    last,
    roles.sigmas,
    mode=config.start_mode,
    boundary_index=config.boundary_index,
    noise=sample_noise(key, sample_index, roles.latent_shape),
    eta=config.eta,
  )


def renoise_sigma(
  config: DMDConfig, sigma_s: jax.Array, sample_index: jax.Array, key: jax.Array
) -> jax.Array:
  """Levels [B] at which teacher and fake score are compared."""
  if config.objective == "dmd":
    return timesteps.uniform_sigma(
      key, sample_index, low=config.min_step, high=config.max_step, shift=config.shift
    )
  return timesteps.renoise_sigma(
    key,
    sigma_s,
    sample_index,
    offset=config.offset,
    end=config.end,
    low=config.min_step,
    high=config.max_step,
    inside=config.inside,
  )


def fake_score_loss(
  velocity: Velocity,
  config: DMDConfig,
  sigmas: jax.Array,
  x_s: jax.Array,
  sigma_s: jax.Array,
  sample_index: jax.Array,
  key: jax.Array,
) -> tuple[jax.Array, Metrics]:
  """The fake-score loss on samples `x_s` [B, ...] of the generator (equations of section 3.1)."""
  level_key, noise_key, back_key, path_key = jax.random.split(key, 4)
  shape = x_s.shape[1:]
  noise = sample_noise(noise_key, sample_index, shape)
  if config.objective == "dmd":
    # Plain DMD trains the fake score at SD3's own density of levels.
    sigma = timesteps.logit_normal_sigma(level_key, sample_index, shift=config.shift)
    x0 = jax.lax.stop_gradient(x_s)
    level = sigma.reshape(-1, *[1] * len(shape))
    loss = losses.flow_matching_loss(velocity((1 - level) * x0 + level * noise, sigma), x0, noise)
    return loss, {"fake_score": loss}
  sigma_t = renoise_sigma(config, sigma_s, sample_index, level_key)
  c = config.consistency
  steps_back = transition_noise = None
  if c.weight:
    if c.adjacent:
      steps_back = timesteps.adjacent_steps(sigma_t, sigmas, c.transitions)
    else:
      steps_back = timesteps.consistency_steps(
        back_key, c.transitions, sample_index, epsilon=c.max_steps_back
      )
    paths = 2 if c.two_sample else 1
    transition_noise = sample_noise(path_key, sample_index, (paths, c.transitions, *shape))
    transition_noise = jnp.moveaxis(transition_noise, 0, 2)
  return losses.ambient_fake_score_loss(
    velocity,
    x_s,
    sigma_s,
    sigma_t,
    noise,
    scale_out=config.scale_out,
    weight_low=config.weight_low,
    weight_high=config.weight_high,
    consistency_weight=c.weight,
    steps_back=steps_back,
    transition_noise=transition_noise,
    eta=config.eta,
    two_sample=c.two_sample,
    stop_transitions=c.stop_transitions,
  )


def generator_loss(
  x_s: jax.Array,
  sigma_s: jax.Array,
  teacher: Velocity,
  fake: Velocity,
  config: DMDConfig,
  sample_index: jax.Array,
  key: jax.Array,
  weights: jax.Array | None = None,
) -> jax.Array:
  """The generator's distribution-matching loss on `x_s` [B, ...], weights [B] or None."""
  level_key, noise_key, transition_key = jax.random.split(key, 3)
  shape = x_s.shape[1:]
  sigma_t = renoise_sigma(config, sigma_s, sample_index, level_key)
  noise = sample_noise(noise_key, sample_index, shape)
  if config.objective == "dmd":
    return losses.plain_generator_loss(
      x_s, sigma_t, noise, teacher, fake, normalize=config.normalize, weights=weights
    )
  return losses.generator_loss(
    x_s,
    sigma_s,
    sigma_t,
    noise,
    sample_noise(transition_key, sample_index, shape),
    teacher,
    fake,
    eta=config.eta,
    normalize=config.normalize,
    weights=weights,
  )


def fake_score_step(
  state: TrainState,
  frozen: Frozen,
  batch: Batch,
  key: jax.Array,
  *,
  roles: Roles,
  config: DMDConfig,
  optimizer: optax.GradientTransformation,
  micro_batches: int = 1,
) -> tuple[TrainState, Metrics]:
  """One update of the fake score on fresh samples of the generator."""
  rollout_key, start_key, loss_key = jax.random.split(key, 3)

  def loss_fn(adapters: Tree, index: jax.Array, prompt: jax.Array) -> tuple[jax.Array, Metrics]:
    conditioning = batch.conditioning.take(prompt)
    generator = generator_velocity(roles, frozen, state.generator, conditioning)
    last = sample_last_step(generator, roles, config, index, rollout_key, differentiable=False)
    x_s, sigma_s = start_of_interval(last, roles, config, index, start_key)
    velocity = fake_score_velocity(roles, frozen, adapters, conditioning)
    return fake_score_loss(velocity, config, roles.sigmas, x_s, sigma_s, index, loss_key)

  rows = (batch.sample_index, batch.prompt_index)
  grads, parts = accumulated_grad(loss_fn, state.fake_score, micro_batches, *rows)
  adapters, opt_state, info = guarded_update(
    optimizer, grads, state.fake_score_opt, state.fake_score
  )
  metrics = {f"loss/{name}": value for name, value in parts.items()}
  metrics |= {f"fake_score/{name}": value for name, value in info.items()}
  return state.replace(fake_score=adapters, fake_score_opt=opt_state), metrics


def generator_step(
  state: TrainState,
  frozen: Frozen,
  batch: Batch,
  key: jax.Array,
  *,
  roles: Roles,
  config: DMDConfig,
  optimizer: optax.GradientTransformation,
  micro_batches: int = 1,
) -> tuple[TrainState, Metrics]:
  """One update of the generator towards the teacher, against the fake score."""
  rollout_key, start_key, loss_key, guidance_key = jax.random.split(key, 4)

  def loss_fn(adapters: Tree, index: jax.Array, prompt: jax.Array) -> tuple[jax.Array, Metrics]:
    conditioning = batch.conditioning.take(prompt)
    fake = fake_score_velocity(roles, frozen, state.fake_score, conditioning)
    teacher = teacher_velocity(
      roles, frozen, config, conditioning, batch.unconditional, guidance_key
    )
    velocity = generator_velocity(roles, frozen, adapters, conditioning)
    last = sample_last_step(velocity, roles, config, index, rollout_key)
    x_s, sigma_s = start_of_interval(last, roles, config, index, start_key)
    loss = generator_loss(x_s, sigma_s, teacher, fake, config, index, loss_key)
    return loss, {"generator": loss}

  rows = (batch.sample_index, batch.prompt_index)
  grads, parts = accumulated_grad(loss_fn, state.generator, micro_batches, *rows)
  adapters, opt_state, info = guarded_update(optimizer, grads, state.generator_opt, state.generator)
  metrics = {f"loss/{name}": value for name, value in parts.items()}
  metrics |= {f"generator/{name}": value for name, value in info.items()}
  return state.replace(generator=adapters, generator_opt=opt_state), metrics
