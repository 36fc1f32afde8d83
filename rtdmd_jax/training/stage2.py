"""Stage 2, RTDMD: rollout, fake-score step and policy step (arXiv 2605.26108, section 3.2).

An epoch is `rollout`, scoring by the rewards that live on the host (if any), `fake_score_step`
(which runs while the host scores) and `policy_step`: one update of the generator, one or more of
the fake score.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from rtdmd_jax.algo import losses, subgrpo
from rtdmd_jax.algo.advantages import group_advantages, signal_mask, usable
from rtdmd_jax.algo.rollout import LastStep, sample_rollout
from rtdmd_jax.algo.transitions import (
  cps_gaussian_log_prob,
  cps_log_prob,
  cps_mean,
  cps_std,
  cps_step,
  x0_from_v,
)
from rtdmd_jax.pipeline.velocity import role_variables, role_velocity
from rtdmd_jax.runtime.sharding import constrain
from rtdmd_jax.training import stage1
from rtdmd_jax.training.latent_rewards import LatentRewards, ScoredLatents, score_latents
from rtdmd_jax.training.micro_batching import accumulated_grad, map_parts, sorted_parts
from rtdmd_jax.training.optim import guarded_update, repeated_update
from rtdmd_jax.training.settings import DMDConfig, PolicyConfig
from rtdmd_jax.training.state import Batch, Frozen, Metrics, Roles, TrainState

Tree = Any

# Metrics whose maximum over steps and micro-batches is reported; of all others the mean is.
_MAXIMA = frozenset({"ratio/drift"})


@flax.struct.dataclass
class RolloutBatch:
  """One epoch's samples; `x[0]` is the initial noise and `x[K]` the clean latents."""

  x: jax.Array  # [K + 1, N, h, w, c]
  log_prob: jax.Array  # [K, N]
  chosen: jax.Array  # [M] indices of the steps that train
  rewards: dict[str, jax.Array]  # [N] each, of the device rewards
  images: jax.Array  # [N, H, W, 3] uint8, for the host's rewards
  # Of the rewards that are back-propagated, if there are any: [N] their weighted sum, and
  # [N, h, w, c] its gradient by the clean latents.
  weighted_reward: jax.Array | None = None
  reward_grad: jax.Array | None = None


def collect_rollout(
  state: TrainState,
  frozen: Frozen,
  batch: Batch,
  key: jax.Array,
  *,
  roles: Roles,
  config: DMDConfig,
  policy: PolicyConfig,
  scoring: LatentRewards,
) -> RolloutBatch:
  """K steps of the generator for every sample, decoded and scored, in micro-batches.

  Steps that do not train share their noise among the repeats of a prompt (SubGRPO). The policy
  update's own last step gives the same clean latents, so the gradient of the rewards by them is
  taken here, where they are decoded anyway.
  """
  start_key, step_key, choice_key = jax.random.split(key, 3)
  chosen = subgrpo.choose_steps(
    choice_key,
    num_train_steps=policy.num_train_steps,
    range_start=policy.range_start,
    range_end=policy.range_end,
  )
  steps = roles.sigmas.shape[0] - 1

  def micro(rows: jax.Array) -> tuple:
    sample, prompt = batch.sample_index[rows], batch.prompt_index[rows]
    velocity = stage1.generator_velocity(
      roles, frozen, state.generator, batch.conditioning.take(prompt)
    )
    noise = subgrpo.sample_noise(start_key, sample, roles.latent_shape)
    step_noise = subgrpo.step_noise(
      step_key, sample, prompt, chosen, steps=steps, shape=roles.latent_shape
    )
    path = sample_rollout(velocity, noise, roles.sigmas, step_noise, eta=config.eta)
    x = jnp.concatenate([path.x, path.x_next[-1:]])
    found = map_parts(decoded, policy.decode_parts, x[-1], prompt)
    return jnp.moveaxis(x, 0, 1), path.log_prob.T, found

  def decoded(latents: jax.Array, prompt: jax.Array) -> ScoredLatents:
    text = jax.tree.map(lambda a: a[prompt], batch.reward_text)
    backward = scoring.differentiable if policy.reward_weight else ()
    found = score_latents(latents, text, frozen, scoring, backward)
    return found._replace(images=jnp.round(255.0 * found.images).astype(jnp.uint8))

  samples = jnp.arange(batch.sample_index.shape[0])
  x, log_prob, found = map_parts(micro, policy.micro_batches, samples)
  return RolloutBatch(jnp.moveaxis(x, 1, 0), log_prob.T, chosen, *found)


def fake_score_step(
  state: TrainState,
  frozen: Frozen,
  batch: Batch,
  samples: RolloutBatch,
  key: jax.Array,
  *,
  roles: Roles,
  config: DMDConfig,
  policy: PolicyConfig,
  optimizer: optax.GradientTransformation,
  updates: int = 1,
) -> tuple[TrainState, Metrics]:
  """Updates of the fake score on all final samples, gradients accumulated by scan.

  There are `updates` of them, each with noise and levels of its own; the first does not depend on
  how many follow. Metrics are those of `optim.repeated_update`.
  """

  def update(carry: tuple[Tree, Tree], key: jax.Array) -> tuple[tuple[Tree, Tree], Tree]:
    def loss_fn(adapters: Tree, *rows: jax.Array) -> tuple[jax.Array, Metrics]:
      x_0, index, prompt = rows
      conditioning = batch.conditioning.take(prompt)
      velocity = stage1.fake_score_velocity(roles, frozen, adapters, conditioning)
      sigmas = roles.sigmas
      return stage1.fake_score_loss(velocity, config, sigmas, x_0, sigmas[-1], index, key)

    adapters, opt_state = carry
    rows = (samples.x[-1], batch.sample_index, batch.prompt_index)
    grads, parts = accumulated_grad(loss_fn, adapters, policy.micro_batches, *rows)
    adapters, opt_state, info = guarded_update(optimizer, grads, opt_state, adapters)
    return (adapters, opt_state), (parts, info)

  start = state.fake_score, state.fake_score_opt
  (adapters, opt_state), parts, info = repeated_update(update, start, key, updates)
  metrics = {f"loss/{name}": value for name, value in parts.items()}
  metrics |= {f"fake_score/{name}": value for name, value in info.items()}
  return state.replace(fake_score=adapters, fake_score_opt=opt_state), metrics


class _Rows(NamedTuple):
  """What a policy update reads of each sample."""

  x: jax.Array  # [N, K + 1, h, w, c], see `Rollout`
  log_prob: jax.Array  # [N, K]
  advantage: jax.Array  # [N]
  weight: jax.Array  # [N] of the policy term, 0 without signal
  other_weight: jax.Array  # [N] of the terms that need no advantage
  prompt: jax.Array  # [N]
  index: jax.Array  # [N], see `Batch`
  weighted_reward: jax.Array | None  # see `Rollout`
  reward_grad: jax.Array | None


def policy_loss(
  velocity: jax.Array,
  reference: jax.Array | None,
  x: jax.Array,
  x_next: jax.Array,
  sigma: jax.Array,
  next_sigma: jax.Array,
  old_log_prob: jax.Array,
  advantage: jax.Array,
  weights: jax.Array,
  config: DMDConfig,
  policy: PolicyConfig,
  steps: int,
) -> tuple[jax.Array, Metrics]:
  """SubGRPO's loss of one chosen step for a micro-batch [n].

  The update is on-policy, so its ratio is exactly 1; the ratio to the rollout's own log-probability
  is only reported, as the rounding drift between the two compiled programs.
  """
  mean = cps_mean(x, velocity, sigma, next_sigma, config.eta)
  std = cps_std(next_sigma, config.eta)
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
  metrics = {"loss/policy": loss}
  if reference is not None:
    mean_ref = cps_mean(x, reference, sigma, next_sigma, config.eta)
    kl = losses.kl_to_reference(mean, mean_ref, std, weights=weights)
    loss += policy.kl_weight * kl
    metrics["loss/kl"] = kl
  ratio = jnp.exp(jax.lax.stop_gradient(cps_log_prob(x_next, mean)) - old_log_prob)
  outside = (ratio < 1 - policy.clip_low) | (ratio > 1 + policy.clip_high)
  metrics["ratio/drift"] = jnp.max(jnp.abs(ratio - 1.0))
  metrics["ratio/outside_clip"] = jnp.mean(outside.astype(jnp.float32))
  return loss, metrics


def _combined(name: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """How two micro-batches' values of a metric become one; sums are divided at the end."""
  return jnp.maximum if name in _MAXIMA else jnp.add


def policy_step(
  state: TrainState,
  frozen: Frozen,
  batch: Batch,
  samples: RolloutBatch,
  rewards: dict[str, jax.Array],
  key: jax.Array,
  *,
  roles: Roles,
  config: DMDConfig,
  policy: PolicyConfig,
  scoring: LatentRewards,
  optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
  """One update of the generator by the hybrid policy gradient.

  Samples whose rewards show no spread around their baseline carry no signal: they get weight 0,
  each device sorts its own to the end, and micro-batches of nothing else are not computed. Where no
  sample of the batch has signal, the terms that need no advantage train on all that were scored.

  Args:
    state: adapters and optimizer states.
    frozen: bases, decoder, reward models.
    batch: prompts and sample indices [N].
    samples: from `rollout`.
    rewards: [N] each, every reward of `scoring.weights`; NaN marks a sample that failed.
    key: the epoch's key.
    roles: how to compute the roles.
    config: distribution matching.
    policy: policy gradient.
    scoring: rewards.
    optimizer: of the generator.
  """
  level_key, guidance_key = jax.random.split(key)
  count = batch.sample_index.shape[0]
  last_index = roles.sigmas.shape[0] - 2
  advantages = group_advantages(
    rewards,
    batch.prompt_index,
    scoring.weights,
    per_prompt=policy.per_prompt,
    global_std=policy.global_std,
    weight_advantages=policy.weight_advantages,
  )
  signal = signal_mask(
    rewards,
    batch.prompt_index,
    scoring.weights,
    per_prompt=policy.per_prompt,
    weight_advantages=policy.weight_advantages,
  )
  scored = jnp.any(jnp.stack([usable(value) for value in rewards.values()]), axis=0)
  keep = signal | (scored & ~jnp.any(signal))
  weight, other_weight = (a * (count / jnp.maximum(jnp.sum(a), 1)) for a in (signal, keep))
  x, log_prob = jnp.moveaxis(samples.x, 1, 0), samples.log_prob.T
  sample = (batch.prompt_index, batch.sample_index, samples.weighted_reward, samples.reward_grad)
  rows = _Rows(x, log_prob, advantages, weight, other_weight, *sample)
  parts = sorted_parts(~keep, policy.micro_batches, rows)
  terms = policy.num_train_steps + 1
  indices = jnp.concatenate([samples.chosen, jnp.array([last_index])])

  def loss_fn(adapters: Tree, part: _Rows) -> tuple[jax.Array, Metrics]:
    n = part.x.shape[0]
    conditioning = batch.conditioning.take(part.prompt)
    path = jnp.moveaxis(part.x, 1, 0)
    # All trained steps of the micro-batch go through the network in one call.
    x = path[indices].reshape(terms * n, *roles.latent_shape)
    sigma = jnp.repeat(roles.sigmas[indices], n)
    tiled = jax.tree.map(lambda a: jnp.tile(a, (terms, *[1] * (a.ndim - 1))), conditioning)
    velocity = stage1.generator_velocity(roles, frozen, adapters, tiled)
    v = velocity(x, sigma).reshape(terms, n, *roles.latent_shape)
    x = x.reshape(v.shape)
    reference = None
    if policy.kl_weight:
      base = role_variables(frozen.bases[roles.generator], frozen.generator)
      reference = jax.lax.stop_gradient(
        role_velocity(roles.apply, base, tiled, embedded_guidance=roles.embedded_guidance)(
          x.reshape(terms * n, *roles.latent_shape), sigma
        )
      ).reshape(v.shape)
    total, steps = 0.0, []
    for j in range(policy.num_train_steps):
      i = samples.chosen[j]
      loss, metrics = policy_loss(
        v[j],
        None if reference is None else reference[j],
        x[j],
        path[i + 1],
        roles.sigmas[i],
        roles.sigmas[i + 1],
        part.log_prob[:, i],
        part.advantage,
        part.weight,
        config,
        policy,
        last_index + 1,
      )
      total += policy.policy_weight * loss
      steps.append(metrics)
    metrics = {
      name: (jnp.max if name in _MAXIMA else jnp.mean)(jnp.stack([m[name] for m in steps]))
      for name in steps[0]
    }
    last, more = _last_step_loss(v[-1], x[-1], part, conditioning)
    return (total + last) / terms, metrics | more

  def _last_step_loss(v, x, part, conditioning) -> tuple[jax.Array, Metrics]:
    sigma, next_sigma = roles.sigmas[last_index], roles.sigmas[last_index + 1]
    start_key, noise_key = jax.random.split(level_key)
    x0 = x0_from_v(x, v, sigma)
    loss, metrics = jnp.zeros(()), {}
    if policy.dmd_weight:
      x_next = cps_step(x, v, sigma, next_sigma, config.eta, jnp.zeros_like(x))
      last = LastStep(x, v, x_next, x0, sigma, next_sigma)
      x_s, sigma_s = stage1.start_of_interval(last, roles, config, part.index, start_key)
      dm = stage1.generator_loss(
        x_s,
        sigma_s,
        stage1.teacher_velocity(
          roles, frozen, config, conditioning, batch.unconditional, guidance_key
        ),
        stage1.fake_score_velocity(roles, frozen, state.fake_score, conditioning),
        config,
        part.index,
        noise_key,
        weights=part.other_weight,
      )
      loss += policy.dmd_weight * dm
      metrics["loss/generator"] = dm
    if policy.reward_weight and part.reward_grad is not None:
      # Linear around the rollout's latents, which are these.
      change = jnp.sum(part.reward_grad * (x0 - jax.lax.stop_gradient(x0)), axis=(1, 2, 3))
      hinge = losses.reward_hinge(
        part.weighted_reward + change, policy.reward_margin, part.other_weight
      )
      loss += policy.reward_weight * hinge
      metrics["loss/reward_backprop"] = hinge
    return loss, metrics

  grad_fn = jax.grad(loss_fn, has_aux=True)
  shapes = jax.eval_shape(grad_fn, state.generator, jax.tree.map(lambda a: a[0], parts))
  empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  def accumulate(carry: Tree, part: _Rows) -> tuple[Tree, None]:
    part = jax.tree.map(constrain, part)
    counts = jnp.any(part.other_weight > 0)
    new = jax.lax.cond(counts, lambda: grad_fn(state.generator, part), lambda: empty)
    grads = jax.tree.map(jnp.add, carry[0], new[0])
    return (grads, {name: _combined(name)(carry[1][name], new[1][name]) for name in new[1]}), None

  (grads, metrics), _ = jax.lax.scan(accumulate, empty, parts)
  grads = jax.tree.map(lambda g: g / policy.micro_batches, grads)
  sums = metrics.keys() - _MAXIMA
  metrics |= {name: metrics[name] / policy.micro_batches for name in sums}
  adapters, opt_state, info = guarded_update(optimizer, grads, state.generator_opt, state.generator)
  metrics |= {f"generator/{name}": value for name, value in info.items()}
  metrics |= {"samples/kept": jnp.mean(signal.astype(jnp.float32))}
  metrics |= {"advantage/abs_mean": jnp.mean(jnp.abs(advantages))}
  for name, value in rewards.items():
    known = jnp.where(usable(value), value, jnp.nan)
    metrics[f"reward/{name}"] = jnp.nanmean(known)
    metrics[f"reward_std/{name}"] = jnp.nanstd(known)
    metrics[f"reward_failed/{name}"] = jnp.sum(~usable(value))
  return state.replace(generator=adapters, generator_opt=opt_state), metrics
