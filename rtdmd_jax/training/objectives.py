"""Objectives of distribution matching: AC-DMD (arXiv 2605.26108, section 3.1) and plain DMD."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from rtdmd_jax.algo import losses, timesteps
from rtdmd_jax.algo.rollout import LastStep, Velocity, subinterval_start
from rtdmd_jax.algo.subgrpo import sample_noise
from rtdmd_jax.training.settings import DMDConfig
from rtdmd_jax.training.state import Metrics


class Start(NamedTuple):
  """Samples of the generator at the sigma from which they are renoised.

  Attributes:
    x: [B, h, w, c] samples x_s.
    sigma: [] their sigma_s.
  """

  x: jax.Array
  sigma: jax.Array


class Objective(Protocol):
  """The interface of an objective; `index` [B] are global sample indices, `key` is the step's."""

  def start(self, last: LastStep, index: jax.Array, key: jax.Array) -> Start:
    """Samples to renoise, made of the last executed step of a rollout."""

  def fake_score_loss(
    self, velocity: Velocity, start: Start, index: jax.Array, key: jax.Array
  ) -> tuple[jax.Array, Metrics]:
    """The fake score's loss and its parts."""

  def generator_loss(
    self,
    start: Start,
    velocities: tuple[Velocity, Velocity],
    index: jax.Array,
    key: jax.Array,
    weights: jax.Array | None = None,
  ) -> jax.Array:
    """The generator's loss against (teacher, fake score); `weights` [B] or None for ones."""


def make_objective(dmd: DMDConfig, sigmas: jax.Array) -> Objective:
  """The objective that `dmd.objective` names, on the schedule `sigmas` [K + 1]."""
  return {"ac_dmd": AmbientDMD, "dmd": PlainDMD}[dmd.objective](dmd, sigmas)


@dataclass(frozen=True)
class AmbientDMD:
  """AC-DMD: matching on sub-intervals of the schedule, a fake score with a consistency term."""

  dmd: DMDConfig
  sigmas: jax.Array

  def start(self, last: LastStep, index: jax.Array, key: jax.Array) -> Start:
    """The start (x_s, sigma_s) of the sub-interval in which the rollout stopped."""
    x, sigma = subinterval_start(
      last,
      self.sigmas,
      mode=self.dmd.start_mode,
      boundary_index=self.dmd.boundary_index,
      noise=sample_noise(key, index, last.x.shape[1:]),
      eta=self.dmd.eta,
    )
    return Start(x, sigma)

  def renoise_sigma(self, sigma_s: jax.Array, index: jax.Array, key: jax.Array) -> jax.Array:
    """Sigmas [B] at which teacher and fake score are compared."""
    dmd = self.dmd
    return timesteps.renoise_sigma(
      key,
      sigma_s,
      index,
      offset=dmd.offset,
      end=dmd.end,
      low=dmd.min_step,
      high=dmd.max_step,
      inside=dmd.inside,
    )

  def fake_score_loss(
    self, velocity: Velocity, start: Start, index: jax.Array, key: jax.Array
  ) -> tuple[jax.Array, Metrics]:
    """The ambient denoising loss with the consistency term, and both by name."""
    sigma_key, noise_key, back_key, path_key = jax.random.split(key, 4)
    shape, dmd, consistency = start.x.shape[1:], self.dmd, self.dmd.consistency
    noise = sample_noise(noise_key, index, shape)
    sigma_t = self.renoise_sigma(start.sigma, index, sigma_key)
    steps_back = transition_noise = None
    if consistency.weight:
      steps_back = self._steps_back(sigma_t, index, back_key)
      paths = 2 if consistency.two_sample else 1
      transition_noise = sample_noise(path_key, index, (paths, consistency.transitions, *shape))
      transition_noise = jnp.moveaxis(transition_noise, 0, 2)
    return losses.ambient_fake_score_loss(
      velocity,
      start.x,
      start.sigma,
      sigma_t,
      noise,
      scale_out=dmd.scale_out,
      weight_low=dmd.weight_low,
      weight_high=dmd.weight_high,
      consistency_weight=consistency.weight,
      steps_back=steps_back,
      transition_noise=transition_noise,
      eta=dmd.eta,
      two_sample=consistency.two_sample,
      stop_transitions=consistency.stop_transitions,
    )

  def _steps_back(self, sigma_t: jax.Array, index: jax.Array, key: jax.Array) -> jax.Array:
    """Sizes [M, B] of the consistency term's transitions, in units of sigma."""
    consistency = self.dmd.consistency
    if consistency.adjacent:
      return timesteps.adjacent_steps(sigma_t, self.sigmas, consistency.transitions)
    return timesteps.consistency_steps(
      key, consistency.transitions, index, epsilon=consistency.max_steps_back
    )

  def generator_loss(
    self,
    start: Start,
    velocities: tuple[Velocity, Velocity],
    index: jax.Array,
    key: jax.Array,
    weights: jax.Array | None = None,
  ) -> jax.Array:
    """Distribution matching at the start of the sub-interval, one transition back from sigma_t."""
    sigma_key, noise_key, transition_key = jax.random.split(key, 3)
    shape = start.x.shape[1:]
    sigma_t = self.renoise_sigma(start.sigma, index, sigma_key)
    return losses.generator_loss(
      start.x,
      start.sigma,
      sigma_t,
      sample_noise(noise_key, index, shape),
      sample_noise(transition_key, index, shape),
      *velocities,
      eta=self.dmd.eta,
      normalize=self.dmd.normalize,
      weights=weights,
    )


@dataclass(frozen=True)
class PlainDMD:
  """DMD on clean predictions, at sigmas of the whole schedule (arXiv 2311.18828)."""

  dmd: DMDConfig
  sigmas: jax.Array

  def start(self, last: LastStep, index: jax.Array, key: jax.Array) -> Start:
    """The clean prediction, at sigma 0."""
    return Start(last.x0, jnp.zeros(()))

  def fake_score_loss(
    self, velocity: Velocity, start: Start, index: jax.Array, key: jax.Array
  ) -> tuple[jax.Array, Metrics]:
    """Flow matching at SD3's own density of sigmas."""
    sigma_key, noise_key, _, _ = jax.random.split(key, 4)
    shape = start.x.shape[1:]
    noise = sample_noise(noise_key, index, shape)
    sigma = timesteps.logit_normal_sigma(sigma_key, index, shift=self.dmd.shift)
    x0 = jax.lax.stop_gradient(start.x)
    column = sigma.reshape(-1, *[1] * len(shape))
    v = velocity((1 - column) * x0 + column * noise, sigma)
    loss = losses.flow_matching_loss(v, x0, noise)
    return loss, {"fake_score": loss}

  def generator_loss(
    self,
    start: Start,
    velocities: tuple[Velocity, Velocity],
    index: jax.Array,
    key: jax.Array,
    weights: jax.Array | None = None,
  ) -> jax.Array:
    """Distribution matching of clean predictions, at a uniform sigma."""
    sigma_key, noise_key, _ = jax.random.split(key, 3)
    dmd = self.dmd
    sigma = timesteps.uniform_sigma(
      sigma_key, index, low=dmd.min_step, high=dmd.max_step, shift=dmd.shift
    )
    noise = sample_noise(noise_key, index, start.x.shape[1:])
    return losses.plain_generator_loss(
      start.x, sigma, noise, *velocities, normalize=dmd.normalize, weights=weights
    )
