"""Stage 1, AC-DMD: the two updates of the cold start (arXiv 2605.26108, section 3.1)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from rtdmd_jax.training.micro_batching import accumulated_grad
from rtdmd_jax.training.objectives import Objective, make_objective
from rtdmd_jax.training.optim import Optimizers, apply_gradients
from rtdmd_jax.training.programs import Program
from rtdmd_jax.training.settings import DMDConfig
from rtdmd_jax.training.state import Batch, Frozen, Metrics, Roles, TrainState
from rtdmd_jax.training.velocities import (
  fake_score_velocity,
  generator_velocity,
  sample_last_step,
  teacher_velocity,
)

Tree = Any


@dataclass(frozen=True)
class Stage1:
  """AC-DMD's updates; its fields are what is fixed when they are compiled.

  Attributes:
    roles: how generator, fake score and teacher are computed.
    dmd: distribution matching.
    optimizers: of both networks.
    micro_batches: parts of a batch whose gradients are added up.
    fake_update_ratio: updates of the fake score for each of the generator.
  """

  roles: Roles
  dmd: DMDConfig
  optimizers: Optimizers
  micro_batches: int = 1
  fake_update_ratio: int = 1

  @property
  def objective(self) -> Objective:
    """The objective of both updates."""
    return make_objective(self.dmd, self.roles.sigmas)

  @property
  def programs(self) -> tuple[Program, ...]:
    """The two updates as programs."""
    reads = ("state", "frozen", "batch")
    return (
      Program("fake_score", self.fake_score_step, reads, stream=1),
      Program("generator", self.generator_step, reads, stream=2),
    )

  def step(
    self, run: Mapping[str, Callable], state: TrainState, frozen: Frozen, batch: Batch, number: int
  ) -> tuple[TrainState, Metrics]:
    """A fake-score update, and after every `fake_update_ratio`-th of them a generator update.

    Args:
      run: the compiled programs by name.
      state: before the step.
      frozen: what training reads and never changes.
      batch: the step's.
      number: of the step, from 0.
    """
    state, metrics = run["fake_score"](state, frozen, batch)
    if (number + 1) % self.fake_update_ratio == 0:
      state, more = run["generator"](state, frozen, batch)
      metrics |= more
    return state, metrics

  def fake_score_step(
    self, state: TrainState, frozen: Frozen, batch: Batch, key: jax.Array
  ) -> tuple[TrainState, Metrics]:
    """One update of the fake score on new samples of the generator."""
    rollout_key, start_key, loss_key = jax.random.split(key, 3)
    roles, objective = self.roles, self.objective

    def loss_fn(adapters: Tree, index: jax.Array, prompt: jax.Array) -> tuple[jax.Array, Metrics]:
      conditioning = batch.conditioning.take(prompt)
      generator = generator_velocity(roles, frozen, state.generator, conditioning)
      last = sample_last_step(
        generator, roles, self.dmd.eta, index, rollout_key, differentiable=False
      )
      start = objective.start(last, index, start_key)
      velocity = fake_score_velocity(roles, frozen, adapters, conditioning)
      return objective.fake_score_loss(velocity, start, index, loss_key)

    return self._update(state, "fake_score", loss_fn, batch)

  def generator_step(
    self, state: TrainState, frozen: Frozen, batch: Batch, key: jax.Array
  ) -> tuple[TrainState, Metrics]:
    """One update of the generator towards the teacher, against the fake score."""
    rollout_key, start_key, loss_key, guidance_key = jax.random.split(key, 4)
    roles, objective = self.roles, self.objective

    def loss_fn(adapters: Tree, index: jax.Array, prompt: jax.Array) -> tuple[jax.Array, Metrics]:
      conditioning = batch.conditioning.take(prompt)
      fake = fake_score_velocity(roles, frozen, state.fake_score, conditioning)
      teacher = teacher_velocity(
        roles, frozen, self.dmd, conditioning, batch.unconditional, guidance_key
      )
      velocity = generator_velocity(roles, frozen, adapters, conditioning)
      last = sample_last_step(velocity, roles, self.dmd.eta, index, rollout_key)
      start = objective.start(last, index, start_key)
      loss = objective.generator_loss(start, (teacher, fake), index, loss_key)
      return loss, {"generator": loss}

    return self._update(state, "generator", loss_fn, batch)

  def _update(
    self, state: TrainState, network: str, loss_fn: Callable, batch: Batch
  ) -> tuple[TrainState, Metrics]:
    """An update of one network by the gradient of its loss over the micro-batches."""
    rows = (batch.sample_index, batch.prompt_index)
    adapters, _ = state.trained(network)
    grads, parts = accumulated_grad(loss_fn, adapters, self.micro_batches, *rows)
    optimizer = getattr(self.optimizers, network)
    state, metrics = apply_gradients(state, network, optimizer, grads)
    return state, {f"loss/{name}": value for name, value in parts.items()} | metrics
