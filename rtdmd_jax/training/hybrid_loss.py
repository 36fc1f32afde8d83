"""RTDMD's hybrid loss of a micro-batch (arXiv 2605.26108, section 3.2).

SubGRPO on the chosen stochastic steps, distribution matching and back-propagated rewards on the
deterministic last one.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from clu import metrics

from rtdmd_jax.algo import losses, subgrpo
from rtdmd_jax.algo.rollout import LastStep
from rtdmd_jax.algo.transitions import (
  cps_gaussian_log_prob,
  cps_log_prob,
  cps_mean,
  cps_std,
  cps_step,
  x0_from_v,
)
from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.training.objectives import make_objective
from rtdmd_jax.training.part_metrics import ComputedAverage, LossAverage, Maximum
from rtdmd_jax.training.settings import DMDConfig, PolicyConfig
from rtdmd_jax.training.state import Batch, Frozen, Roles
from rtdmd_jax.training.velocities import (
  fake_score_velocity,
  generator_velocity,
  reference_velocity,
  teacher_velocity,
)

Tree = Any


class Rows(NamedTuple):
  """The inputs of a policy update for each sample.

  Attributes:
    x: [N, K + 1, h, w, c] the trajectory, see `RolloutBatch`.
    log_prob: [N, K] of the rollout's transitions.
    advantage: [N].
    weight: [N] of the policy term, 0 without signal.
    other_weight: [N] of the terms that need no advantage.
    prompt: [N] rows of the batch's conditioning.
    index: [N] global sample indices.
    weighted_reward: [N] of the back-propagated rewards, None without any.
    reward_grad: [N, h, w, c] its gradient with respect to the clean latents.
  """

  x: jax.Array
  log_prob: jax.Array
  advantage: jax.Array
  weight: jax.Array
  other_weight: jax.Array
  prompt: jax.Array
  index: jax.Array
  weighted_reward: jax.Array | None
  reward_grad: jax.Array | None


class Transition(NamedTuple):
  """A stochastic step of n trajectories under the networks in training.

  Attributes:
    x: [n, ...] before the step, at `sigma`.
    v: [n, ...] the generator's velocity there.
    x_next: [n, ...] after the step, at `next_sigma`.
    sigma: [].
    next_sigma: [].
    old_log_prob: [n] in the rollout.
    v_reference: [n, ...] the velocity to stay close to; None without `policy.kl_weight`.
  """

  x: jax.Array
  v: jax.Array
  x_next: jax.Array
  sigma: jax.Array
  next_sigma: jax.Array
  old_log_prob: jax.Array
  v_reference: jax.Array | None = None


def policy_term(
  transition: Transition,
  advantage: jax.Array,
  weights: jax.Array,
  eta: float,
  policy: PolicyConfig,
  steps: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """SubGRPO's loss of one chosen step of a micro-batch.

  The update is on-policy, so its ratio is exactly 1; the ratio to the rollout's own log-probability
  is only reported, as the rounding drift between the two compiled programs.

  Args:
    transition: of n samples.
    advantage: [n].
    weights: [n] of the samples.
    eta: stochasticity of the transition.
    policy: clipping and the divergence's weight.
    steps: K of the rollout.

  Returns:
    The loss with the divergence, and by name `loss/policy` [], `loss/kl` [] and the ratio [n].
  """
  x, v, x_next, sigma, next_sigma, old_log_prob, v_reference = transition
  mean, std = cps_mean(x, v, sigma, next_sigma, eta), cps_std(next_sigma, eta)
  if policy.gaussian_log_prob:
    log_prob = cps_gaussian_log_prob(x_next, mean, std)
  else:
    log_prob = cps_log_prob(x_next, mean)
  loss = losses.clipped_policy_loss(
    log_prob,
    jax.lax.stop_gradient(log_prob),
    advantage,
    clip_low=policy.clip_low,
    clip_high=policy.clip_high,
    limit=policy.advantage_limit,
    weights=weights,
  )
  if policy.subset_factor:
    loss *= subgrpo.subset_factor(steps, policy.num_train_steps)
  parts = {"loss/policy": loss}
  if v_reference is not None:
    mean_reference = cps_mean(x, v_reference, sigma, next_sigma, eta)
    kl = losses.kl_to_reference(mean, mean_reference, std, weights=weights)
    loss += policy.kl_weight * kl
    parts["loss/kl"] = kl
  parts["ratio"] = jnp.exp(jax.lax.stop_gradient(cps_log_prob(x_next, mean)) - old_log_prob)
  return loss, parts


def ratio_metrics(ratio: jax.Array, policy: PolicyConfig) -> dict[str, metrics.Metric]:
  """Metrics of the policy's ratios [...]: their distance from 1, the share beyond the clipping."""
  outside = (ratio < 1 - policy.clip_low) | (ratio > 1 + policy.clip_high)
  return {
    "ratio/drift": Maximum.from_model_output(jnp.abs(ratio - 1.0)),
    "ratio/outside_clip": ComputedAverage.from_model_output(outside.astype(jnp.float32)),
  }


@dataclass(frozen=True)
class HybridLoss:
  """The generator's loss of a micro-batch in a policy update.

  Attributes:
    roles: how the networks are computed.
    dmd: distribution matching.
    policy: weights and options of the terms.
    frozen: what training reads and never changes.
    fake_score: the fake score's adapters.
    batch: the epoch's prompts.
    chosen: [M] indices of the steps that train.
    key: the update's key.
  """

  roles: Roles
  dmd: DMDConfig
  policy: PolicyConfig
  frozen: Frozen
  fake_score: Tree
  batch: Batch
  chosen: jax.Array
  key: jax.Array

  def __call__(self, adapters: Tree, rows: Rows) -> tuple[jax.Array, dict[str, metrics.Metric]]:
    """The mean of the chosen steps' terms and the last step's, and their metrics.

    Args:
      adapters: the generator's, with respect to which the loss is differentiated.
      rows: of the micro-batch.
    """
    conditioning = self.batch.conditioning.take(rows.prompt)
    transitions, last = self._visit(adapters, rows, conditioning)
    terms = len(transitions) + 1
    total, parts = 0.0, []
    for transition in transitions:
      loss, part = policy_term(
        transition, rows.advantage, rows.weight, self.dmd.eta, self.policy, self._steps
      )
      total += self.policy.policy_weight * loss
      parts.append(part)
    stacked = {name: jnp.stack([part[name] for part in parts]) for name in parts[0]}
    merged = ratio_metrics(stacked.pop("ratio"), self.policy)
    merged |= {name: LossAverage.from_model_output(jnp.mean(v)) for name, v in stacked.items()}
    last_loss = jnp.zeros(())
    for name, (weight, loss) in self._last_step_terms(last, rows, conditioning).items():
      last_loss += weight * loss
      merged[name] = LossAverage.from_model_output(loss)
    return (total + last_loss) / terms, merged

  @property
  def _steps(self) -> int:
    """The number K of steps."""
    return self.roles.sigmas.shape[0] - 1

  def _visit(
    self, adapters: Tree, rows: Rows, conditioning: Conditioning
  ) -> tuple[list[Transition], LastStep]:
    """The chosen transitions and the last step; all of them go through the network in one call."""
    n, sigmas, shape = rows.x.shape[0], self.roles.sigmas, self.roles.latent_shape
    indices = jnp.concatenate([self.chosen, jnp.array([self._steps - 1])])
    terms = indices.shape[0]
    path = jnp.moveaxis(rows.x, 1, 0)
    x = path[indices].reshape(terms * n, *shape)
    sigma = jnp.repeat(sigmas[indices], n)
    tiled = jax.tree.map(lambda a: jnp.tile(a, (terms, *[1] * (a.ndim - 1))), conditioning)
    velocity = generator_velocity(self.roles, self.frozen, adapters, tiled)
    v = velocity(x, sigma).reshape(terms, n, *shape)
    reference = None
    if self.policy.kl_weight:
      reference = reference_velocity(self.roles, self.frozen, tiled)(x, sigma)
      reference = jax.lax.stop_gradient(reference).reshape(v.shape)
    x = x.reshape(v.shape)
    transitions = []
    for j in range(terms - 1):
      i, v_reference = self.chosen[j], None if reference is None else reference[j]
      ends, old = (sigmas[i], sigmas[i + 1]), rows.log_prob[:, i]
      transitions.append(Transition(x[j], v[j], path[i + 1], *ends, old, v_reference))
    sigma, next_sigma = sigmas[self._steps - 1], sigmas[self._steps]
    x0 = x0_from_v(x[-1], v[-1], sigma)
    x_next = cps_step(x[-1], v[-1], sigma, next_sigma, self.dmd.eta, jnp.zeros_like(x[-1]))
    return transitions, LastStep(x[-1], v[-1], x_next, x0, sigma, next_sigma)

  def _last_step_terms(
    self, last: LastStep, rows: Rows, conditioning: Conditioning
  ) -> dict[str, tuple[float, jax.Array]]:
    """The last step's terms by metric name, each as (weight, loss)."""
    policy, terms = self.policy, {}
    if policy.dmd_weight:
      terms["loss/generator"] = policy.dmd_weight, self._matching(last, rows, conditioning)
    if policy.reward_weight and rows.reward_grad is not None:
      # Linear around the rollout's latents, which are these.
      change = last.x0 - jax.lax.stop_gradient(last.x0)
      change = jnp.sum(rows.reward_grad * change, axis=(1, 2, 3))
      rewards = rows.weighted_reward + change
      hinge = losses.reward_hinge(rewards, policy.reward_margin, rows.other_weight)
      terms["loss/reward_backprop"] = policy.reward_weight, hinge
    return terms

  def _matching(self, last: LastStep, rows: Rows, conditioning: Conditioning) -> jax.Array:
    """Distribution matching of the last step's result."""
    matching_key, guidance_key = jax.random.split(self.key)
    start_key, loss_key = jax.random.split(matching_key)
    objective = make_objective(self.dmd, self.roles.sigmas)
    start = objective.start(last, rows.index, start_key)
    teacher = teacher_velocity(
      self.roles, self.frozen, self.dmd, conditioning, self.batch.unconditional, guidance_key
    )
    fake = fake_score_velocity(self.roles, self.frozen, self.fake_score, conditioning)
    return objective.generator_loss(
      start, (teacher, fake), rows.index, loss_key, weights=rows.other_weight
    )
