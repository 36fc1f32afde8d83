"""Stage 2, RTDMD: rollout, fake-score update and policy update (arXiv 2605.26108, section 3.2).

An epoch is a rollout, scoring by the rewards that live outside of the device (if any), the
fake-score updates (which run while those score) and one policy update.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from rtdmd_jax.algo import subgrpo
from rtdmd_jax.algo.advantages import group_advantages, signal_mask, usable
from rtdmd_jax.algo.rollout import sample_rollout
from rtdmd_jax.runtime.sharding import constrain
from rtdmd_jax.training.hybrid_loss import HybridLoss, Rows
from rtdmd_jax.training.latent_rewards import LatentRewards, ScoredLatents, score_latents
from rtdmd_jax.training.micro_batching import accumulated_grad, map_parts, sorted_parts
from rtdmd_jax.training.objectives import Objective, Start, make_objective
from rtdmd_jax.training.optim import Optimizers, apply_gradients, guarded_update, repeated_update
from rtdmd_jax.training.programs import Program
from rtdmd_jax.training.settings import DMDConfig, PolicyConfig
from rtdmd_jax.training.state import Batch, Frozen, Metrics, Roles, TrainState
from rtdmd_jax.training.velocities import fake_score_velocity, generator_velocity

Tree = Any


@flax.struct.dataclass
class RolloutBatch:
  """One epoch's samples.

  Attributes:
    x: [K + 1, N, h, w, c] trajectories: `x[0]` is the initial noise, `x[K]` the clean latents.
    log_prob: [K, N] of the transitions.
    chosen: [M] indices of the steps that train.
    rewards: [N] of every reward on the device.
    images: [N, H, W, 3] uint8, for the other rewards.
    weighted_reward: [N] the weighted sum of the back-propagated rewards, None without any.
    reward_grad: [N, h, w, c] its gradient with respect to the clean latents.
  """

  x: jax.Array
  log_prob: jax.Array
  chosen: jax.Array
  rewards: dict[str, jax.Array]
  images: jax.Array
  weighted_reward: jax.Array | None = None
  reward_grad: jax.Array | None = None


@dataclass(frozen=True)
class Stage2:
  """RTDMD's epoch; its fields are what is fixed when its programs are compiled.

  Attributes:
    roles: how generator, fake score and teacher are computed.
    dmd: distribution matching.
    policy: the hybrid policy gradient, and how a batch is cut for memory.
    rewards: rewards on the device, and the weights of all that train.
    optimizers: of both networks.
    fake_score_updates: for each policy update.
  """

  roles: Roles
  dmd: DMDConfig
  policy: PolicyConfig
  rewards: LatentRewards
  optimizers: Optimizers
  fake_score_updates: int = 1

  @property
  def objective(self) -> Objective:
    """The objective of distribution matching."""
    return make_objective(self.dmd, self.roles.sigmas)

  @property
  def programs(self) -> tuple[Program, ...]:
    """Rollout, fake-score updates and policy update as programs."""
    reads = ("state", "frozen", "batch")
    return (
      Program("rollout", self.collect_rollout, reads, stream=3, updates=False),
      Program("fake_score", self.fake_score_step, (*reads, "samples"), stream=1),
      Program("policy", self.policy_step, (*reads, "samples", "rewards"), stream=2),
    )

  def step(
    self,
    run: Mapping[str, Callable],
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    score: Callable[[jax.Array], dict[str, jax.Array]] | None,
  ) -> tuple[TrainState, Metrics]:
    """An epoch; the fake score is updated while rewards outside of the device score.

    Args:
      run: the compiled programs by name.
      state: before the step.
      frozen: what training reads and never changes.
      batch: the step's.
      score: maps images [N, H, W, 3] to the rewards [N] that are not on the device, by name; None
        without any.
    """
    samples, metrics = run["rollout"](state, frozen, batch), {}
    if self.policy.dmd_weight:  # else nothing asks for the fake score
      state, metrics = run["fake_score"](state, frozen, batch, samples)
    rewards = dict(samples.rewards)
    if score is not None:
      rewards |= score(samples.images)
    state, more = run["policy"](state, frozen, batch, samples, rewards)
    return state, metrics | more

  def collect_rollout(
    self, state: TrainState, frozen: Frozen, batch: Batch, key: jax.Array
  ) -> RolloutBatch:
    """K steps of the generator for every sample, decoded and scored, in micro-batches.

    Steps that do not train share their noise among the images of a prompt (SubGRPO). The policy
    update's own last step gives the same clean latents, so the gradient of the rewards with respect
    to them is taken here, where they are decoded anyway.
    """
    start_key, step_key, choice_key = jax.random.split(key, 3)
    roles, policy = self.roles, self.policy
    chosen = subgrpo.choose_steps(
      choice_key,
      num_train_steps=policy.num_train_steps,
      range_start=policy.range_start,
      range_end=policy.range_end,
    )
    steps = roles.sigmas.shape[0] - 1

    def sample(rows: jax.Array) -> tuple:
      index, prompt = batch.sample_index[rows], batch.prompt_index[rows]
      conditioning = batch.conditioning.take(prompt)
      velocity = generator_velocity(roles, frozen, state.generator, conditioning)
      noise = subgrpo.sample_noise(start_key, index, roles.latent_shape)
      step_noise = subgrpo.step_noise(
        step_key, index, prompt, chosen, steps=steps, shape=roles.latent_shape
      )
      path = sample_rollout(velocity, noise, roles.sigmas, step_noise, eta=self.dmd.eta)
      x = jnp.concatenate([path.x, path.x_next[-1:]])
      scored = map_parts(score, policy.decode_parts, x[-1], prompt)
      return jnp.moveaxis(x, 0, 1), path.log_prob.T, scored

    def score(latents: jax.Array, prompt: jax.Array) -> ScoredLatents:
      text = jax.tree.map(lambda a: a[prompt], batch.reward_text)
      backward = self.rewards.differentiable if policy.reward_weight else ()
      scored = score_latents(latents, text, frozen, self.rewards, backward)
      return scored._replace(images=jnp.round(255.0 * scored.images).astype(jnp.uint8))

    samples = jnp.arange(batch.sample_index.shape[0])
    x, log_prob, scored = map_parts(sample, policy.micro_batches, samples)
    return RolloutBatch(jnp.moveaxis(x, 1, 0), log_prob.T, chosen, *scored)

  def fake_score_step(
    self,
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    samples: RolloutBatch,
    key: jax.Array,
  ) -> tuple[TrainState, Metrics]:
    """Updates the fake score on the epoch's clean latents, each time with other noise."""
    objective, roles = self.objective, self.roles

    def update(carry: tuple[Tree, Tree], key: jax.Array) -> tuple[tuple[Tree, Tree], Tree]:
      def loss_fn(adapters: Tree, *rows: jax.Array) -> tuple[jax.Array, Metrics]:
        x0, index, prompt = rows
        conditioning = batch.conditioning.take(prompt)
        velocity = fake_score_velocity(roles, frozen, adapters, conditioning)
        return objective.fake_score_loss(velocity, Start(x0, roles.sigmas[-1]), index, key)

      adapters, opt_state = carry
      rows = (samples.x[-1], batch.sample_index, batch.prompt_index)
      grads, parts = accumulated_grad(loss_fn, adapters, self.policy.micro_batches, *rows)
      optimizer = self.optimizers.fake_score
      adapters, opt_state, info = guarded_update(optimizer, grads, opt_state, adapters)
      return (adapters, opt_state), (parts, info)

    start = state.trained("fake_score")
    trained, parts, info = repeated_update(update, start, key, self.fake_score_updates)
    metrics = {f"loss/{name}": value for name, value in parts.items()}
    metrics |= {f"fake_score/{name}": value for name, value in info.items()}
    return state.with_trained("fake_score", *trained), metrics

  def policy_step(
    self,
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    samples: RolloutBatch,
    rewards: dict[str, jax.Array],
    key: jax.Array,
  ) -> tuple[TrainState, Metrics]:
    """One update of the generator by the hybrid policy gradient.

    Samples whose rewards show no spread around their baseline carry no signal: they get weight 0,
    each device sorts its own to the end, and micro-batches of nothing else are not computed. Where
    no sample of the batch has signal, the terms that need no advantage train on all that were
    scored.

    Args:
      state: adapters and optimizer states.
      frozen: bases, decoder, reward models.
      batch: prompts and sample indices [N].
      samples: the epoch's rollout.
      rewards: [N] of every reward that trains; NaN marks a sample that failed.
      key: the update's key.
    """
    rows, signal = self._attach_advantages(batch, samples, rewards)
    parts = sorted_parts(rows.other_weight == 0, self.policy.micro_batches, rows)
    loss = HybridLoss(
      self.roles, self.dmd, self.policy, frozen, state.fake_score, batch, samples.chosen, key
    )
    grads, metrics = self._accumulate(loss, state.generator, parts)
    state, info = apply_gradients(state, "generator", self.optimizers.generator, grads)
    metrics |= info
    metrics |= {"samples/kept": jnp.mean(signal.astype(jnp.float32))}
    metrics |= {"advantage/abs_mean": jnp.mean(jnp.abs(rows.advantage))}
    return state, metrics | _reward_metrics(rewards)

  def _attach_advantages(
    self, batch: Batch, samples: RolloutBatch, rewards: dict[str, jax.Array]
  ) -> tuple[Rows, jax.Array]:
    """The inputs of the update for each sample, and whether the sample has signal [N]."""
    policy, weights = self.policy, self.rewards.weights
    options = {"per_prompt": policy.per_prompt, "weight_advantages": policy.weight_advantages}
    advantages = group_advantages(
      rewards, batch.prompt_index, weights, global_std=policy.global_std, **options
    )
    signal = signal_mask(rewards, batch.prompt_index, weights, **options)
    scored = jnp.any(jnp.stack([usable(value) for value in rewards.values()]), axis=0)
    keep = signal | (scored & ~jnp.any(signal))
    count = batch.sample_index.shape[0]
    weight, other_weight = (a * (count / jnp.maximum(jnp.sum(a), 1)) for a in (signal, keep))
    rows = Rows(
      x=jnp.moveaxis(samples.x, 1, 0),
      log_prob=samples.log_prob.T,
      advantage=advantages,
      weight=weight,
      other_weight=other_weight,
      prompt=batch.prompt_index,
      index=batch.sample_index,
      weighted_reward=samples.weighted_reward,
      reward_grad=samples.reward_grad,
    )
    return rows, signal

  def _accumulate(self, loss: HybridLoss, adapters: Tree, parts: Rows) -> tuple[Tree, Metrics]:
    """The mean gradient over micro-batches [parts, n, ...], and metrics of the whole batch.

    A micro-batch in which no sample has a weight is not computed.
    """
    grad_fn = jax.grad(loss, has_aux=True)
    shapes, kinds = jax.eval_shape(grad_fn, adapters, jax.tree.map(lambda a: a[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    skipped = zeros, {name: type(kind).skipped() for name, kind in kinds.items()}

    def add(total: Tree, part: Rows) -> tuple[Tree, None]:
      part = jax.tree.map(constrain, part)
      counts = jnp.any(part.other_weight > 0)
      new = jax.lax.cond(counts, lambda: grad_fn(adapters, part), lambda: skipped)
      grads = jax.tree.map(jnp.add, total[0], new[0])
      return (grads, {name: total[1][name].merge(new[1][name]) for name in kinds}), None

    empty = zeros, {name: type(kind).empty() for name, kind in kinds.items()}
    (grads, merged), _ = jax.lax.scan(add, empty, parts)
    grads = jax.tree.map(lambda g: g / self.policy.micro_batches, grads)
    return grads, {name: metric.compute() for name, metric in merged.items()}


def _reward_metrics(rewards: dict[str, jax.Array]) -> Metrics:
  """Mean, deviation and number of failures of every reward [N]."""
  metrics = {}
  for name, value in rewards.items():
    known = jnp.where(usable(value), value, jnp.nan)
    metrics[f"reward/{name}"] = jnp.nanmean(known)
    metrics[f"reward_std/{name}"] = jnp.nanstd(known)
    metrics[f"reward_failed/{name}"] = jnp.sum(~usable(value))
  return metrics
