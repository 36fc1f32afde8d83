"""The velocities of generator, fake score and teacher during training (arXiv 2605.26108)."""

from typing import Any

import jax
import jax.numpy as jnp

from rtdmd_jax.adapters.lora import fold_scale
from rtdmd_jax.algo import timesteps
from rtdmd_jax.algo.rollout import LastStep, Velocity, generator_rollout
from rtdmd_jax.algo.subgrpo import sample_noise
from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.pipeline.velocity import role_variables, role_velocity
from rtdmd_jax.training.settings import DMDConfig
from rtdmd_jax.training.state import Frozen, Roles

Tree = Any


def generator_velocity(
  roles: Roles, frozen: Frozen, adapters: Tree, conditioning: Conditioning
) -> Velocity:
  """The generator's velocity, which is never guided."""
  return _trained_velocity(
    roles, frozen.bases[roles.generator], frozen.generator, adapters, conditioning
  )


def fake_score_velocity(
  roles: Roles, frozen: Frozen, adapters: Tree, conditioning: Conditioning
) -> Velocity:
  """The fake score's velocity: conditional, never guided."""
  return _trained_velocity(
    roles, frozen.bases[roles.fake_score], frozen.fake_score, adapters, conditioning
  )


def _trained_velocity(
  roles: Roles, base: Tree, earlier: Tree, adapters: Tree, conditioning: Conditioning
) -> Velocity:
  """A base with the adapters of an earlier stage and those in training."""
  variables = role_variables(base, earlier, fold_scale(adapters, roles.lora_alpha))
  return role_velocity(
    roles.apply, variables, conditioning, embedded_guidance=roles.embedded_guidance
  )


def reference_velocity(roles: Roles, frozen: Frozen, conditioning: Conditioning) -> Velocity:
  """The velocity of the generator that the stage began with, to which `policy.kl_weight` pulls."""
  variables = role_variables(frozen.bases[roles.generator], frozen.generator)
  return role_velocity(
    roles.apply, variables, conditioning, embedded_guidance=roles.embedded_guidance
  )


def teacher_velocity(
  roles: Roles,
  frozen: Frozen,
  dmd: DMDConfig,
  conditioning: Conditioning,
  unconditional: Conditioning | None,
  key: jax.Array,
) -> Velocity:
  """The teacher's velocity, with one guidance scale drawn for the whole global batch."""
  guided = dmd.guidance_high > 1.0 or roles.embedded_guidance
  return role_velocity(
    roles.apply,
    role_variables(frozen.bases[roles.teacher]),
    conditioning,
    unconditional=unconditional if guided else None,
    guidance=timesteps.guidance_scale(key, dmd.guidance_low, dmd.guidance_high),
    embedded_guidance=roles.embedded_guidance,
  )


def sample_last_step(
  velocity: Velocity,
  roles: Roles,
  eta: float,
  sample_index: jax.Array,
  key: jax.Array,
  *,
  differentiable: bool = True,
) -> LastStep:
  """Rolls the generator out from noise to a random stop, one stop for the whole global batch.

  Args:
    velocity: the generator's.
    roles: schedule and shape of the latents.
    eta: stochasticity of the transitions.
    sample_index: [B] global indices of the samples, which determine their noise.
    key: the step's key.
    differentiable: whether the last executed step has a gradient.
  """
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
    velocity, noise, roles.sigmas, step_noise, eta=eta, stop=stop, differentiable=differentiable
  )
