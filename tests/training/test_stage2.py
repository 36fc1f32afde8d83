"""The steps of the second stage on a backbone of one layer."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.algo.transitions import cps_log_prob, cps_mean, cps_std
from rtdmd_jax.runtime.flops import count_flops
from rtdmd_jax.training.latent_rewards import score_latents
from rtdmd_jax.training.optim import Optimizers
from rtdmd_jax.training.settings import DMDConfig, PolicyConfig
from rtdmd_jax.training.stage2 import Stage2
from rtdmd_jax.training.velocities import generator_velocity
from tests.support import toy
from tests.support.programs import call_sites

KEY = jax.random.key(3)
ROLLOUT_KEY = jax.random.key(4)


@cache
def _programs(policy, differentiable=("bright",)):
  """The compiled steps; equal settings share them."""
  stage = _stage(policy, rewards=toy.scoring(differentiable))
  return tuple(map(jax.jit, (stage.collect_rollout, stage.policy_step, stage.fake_score_step)))


def _stage(policy, **more):
  _, optimizer = toy.state()
  settings = {"rewards": toy.scoring(), "optimizers": Optimizers(optimizer, optimizer)} | more
  return Stage2(roles=toy.roles(), dmd=DMDConfig(), policy=policy, **settings)


def _fake_score_step(updates):
  return jax.jit(_stage(PolicyConfig(micro_batches=3), fake_score_updates=updates).fake_score_step)


def _run(policy, rewards=None, state=None):
  state = toy.state()[0] if state is None else state
  batch, frozen = toy.batch(), toy.frozen()
  rollout, update, fake = _programs(policy)
  samples = rollout(state, frozen, batch, ROLLOUT_KEY)
  if rewards is None:
    rewards = samples.rewards | toy.host_rewards(12)
  new, metrics = update(state, frozen, batch, samples, rewards, KEY)
  faked, fake_metrics = fake(state, frozen, batch, samples, KEY)
  return state, samples, new, metrics | fake_metrics, faked


def _same(one, two, tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=0), one, two)


@pytest.mark.slow
def test_parts_change_nothing():
  cuts = (1, 1), (1, 4), (3, 1), (3, 2), (12, 1)
  results = [_run(PolicyConfig(micro_batches=m, decode_parts=d)) for m, d in cuts]
  for other in results[1:]:
    # Summation order only: Adam's first step turns relative rounding into at most that of lr.
    _same(results[0][1].x, other[1].x, 1e-6)
    _same(results[0][1].rewards, other[1].rewards, 1e-6)
    _same(results[0][2].generator, other[2].generator, 1e-4)
    _same(results[0][4].fake_score, other[4].fake_score, 1e-4)


def test_what_is_compiled_once():
  """A `tanh` is a call of the network, a `logistic` is the decoder."""
  state, batch, frozen = toy.state()[0], toy.batch(), toy.frozen()
  rollout, update, fake = _programs(PolicyConfig())
  traced = rollout.trace(state, frozen, batch, ROLLOUT_KEY)
  samples = traced.out_info
  sites = call_sites(traced.jaxpr)
  assert sites["tanh"] == 1 and sites["logistic"] == 1
  sites = call_sites(fake.trace(state, frozen, batch, samples, KEY).jaxpr)
  assert sites["tanh"] == 1
  rewards = samples.rewards | toy.host_rewards(12)
  sites = call_sites(update.trace(state, frozen, batch, samples, rewards, KEY).jaxpr)
  assert sites["tanh"] == 3 and "logistic" not in sites  # generator, teacher, fake score


def test_several_fake_score_updates_are_single_ones_with_other_keys():
  state, frozen, batch = toy.state()[0], toy.frozen(), toy.batch()
  samples = _programs(PolicyConfig())[0](state, frozen, batch, ROLLOUT_KEY)
  once, thrice = _fake_score_step(1), _fake_score_step(3)
  want, losses = state, []
  for i in range(3):
    key = jax.random.fold_in(KEY, i) if i else KEY
    want, metrics = once(want, frozen, batch, samples, key)
    losses.append(float(metrics["loss/fake_score"]))
  got, found = thrice(state, frozen, batch, samples, KEY)
  _same(got, want, 1e-6)
  assert len(set(losses)) == 3
  assert float(found["loss/fake_score"]) == pytest.approx(np.mean(losses), rel=1e-5)
  norm = float(metrics["fake_score/grad_norm"])
  assert float(found["fake_score/grad_norm"]) == pytest.approx(norm, rel=1e-4)


def test_arithmetic_of_several_updates_counts_and_the_network_is_compiled_once():
  state, frozen, batch = toy.state()[0], toy.frozen(), toy.batch()
  samples = _programs(PolicyConfig())[0].trace(state, frozen, batch, ROLLOUT_KEY).out_info
  flops = []
  for updates in (1, 5):
    jaxpr = _fake_score_step(updates).trace(state, frozen, batch, samples, KEY).jaxpr
    assert call_sites(jaxpr)["tanh"] == 1
    flops.append(count_flops(jaxpr))
  assert flops[1] == pytest.approx(5 * flops[0])


def test_adapters_in_bfloat16_train_and_stay_so():
  state, optimizer = toy.state()
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (state.generator, state.fake_score))
  state = state.replace(
    generator=half[0], fake_score=half[1],
    generator_opt=optimizer.init(half[0]), fake_score_opt=optimizer.init(half[1]),
  )  # fmt: skip
  _, _, new, metrics, faked = _run(PolicyConfig(micro_batches=3, kl_weight=0.1), state=state)
  for one in (new, faked):
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), state, one)
  assert np.any(new.generator["b"] != state.generator["b"])
  assert np.any(faked.fake_score["b"] != state.fake_score["b"])
  assert all(np.isfinite(np.asarray(v, np.float32)).all() for v in metrics.values())


def _velocity(adapters):
  batch = toy.batch()
  conditioning = batch.conditioning.take(batch.prompt_index)
  return generator_velocity(toy.roles(), toy.frozen(), adapters, conditioning)


def test_rollout_shares_noise_of_steps_that_do_not_train():
  state, samples, *_ = _run(PolicyConfig())
  assert samples.x.shape == (5, 12, *toy.SHAPE)
  assert samples.images.dtype == jnp.uint8
  velocity, sigmas = _velocity(state.generator), toy.roles().sigmas
  chosen = np.asarray(samples.chosen).tolist()
  assert sorted(set(chosen)) == chosen and len(chosen) == 2
  for i in range(3):  # the stochastic steps
    mean = cps_mean(
      samples.x[i], velocity(samples.x[i], jnp.full(12, sigmas[i])), sigmas[i], sigmas[i + 1], 0.9
    )
    noise = np.asarray((samples.x[i + 1] - mean) / cps_std(sigmas[i + 1], 0.9)).reshape(3, 4, -1)
    within = np.abs(noise - noise[:, :1]).max((1, 2))
    between = np.abs(noise[0, 0] - noise[1, 0]).max()
    assert between > 0.1, i
    assert (within > 0.1).all() if i in chosen else (within < 1e-4).all(), i
  starts = np.asarray(samples.x[0])
  assert np.abs(starts[0] - starts[1]).min() > 0  # initial noise differs within a group


def test_the_ratio_of_an_on_policy_update_is_one():
  _, _, _, metrics, _ = _run(PolicyConfig())
  assert float(metrics["ratio/drift"]) < 1e-6
  # With ratio 1 the loss is minus the mean advantage, which group centring makes 0.
  assert abs(float(metrics["loss/policy"])) < 1e-5


def test_policy_gradient_raises_the_log_probability_of_the_better_sample():
  policy = PolicyConfig(dmd_weight=0.0, reward_weight=0.0)
  rewards = {"bright": jnp.zeros(12), "host": jnp.tile(jnp.array([1.0, 0, 0, 0]), 3)}
  state, samples, new, _, _ = _run(policy, rewards)

  def log_prob(adapters):
    velocity = _velocity(adapters)
    total = 0
    for i in np.asarray(samples.chosen):
      sigma, after = toy.roles().sigmas[i], toy.roles().sigmas[i + 1]
      mean = cps_mean(samples.x[i], velocity(samples.x[i], jnp.full(12, sigma)), sigma, after, 0.9)
      total += cps_log_prob(samples.x[i + 1], mean)
    return total

  before, after = log_prob(state.generator), log_prob(new.generator)
  gain = np.asarray(after - before).reshape(3, 4)
  assert gain[:, 0].mean() > gain[:, 1:].mean()


def test_groups_without_spread_have_no_weight_and_no_spread_at_all_no_policy_gradient():
  flat = {"bright": jnp.zeros(12), "host": jnp.zeros(12)}
  state, _, new, metrics, _ = _run(PolicyConfig(dmd_weight=0.0, reward_weight=0.0), flat)
  assert float(metrics["samples/kept"]) == 0
  assert float(metrics["generator/grad_norm"]) == float(metrics["generator/update_norm"]) == 0
  _same(state.generator, new.generator, 0)
  # One live group of three: its samples count three times as much, the others not at all.
  live = flat | {"host": jnp.zeros(12).at[0].set(1.0)}
  *_, metrics, _ = _run(PolicyConfig(), live)
  assert float(metrics["samples/kept"]) == pytest.approx(1 / 3)


@pytest.mark.slow
def test_without_any_signal_matching_and_back_propagation_train_on_all_samples():
  flat = {"bright": jnp.full(12, 0.3), "host": jnp.zeros(12)}
  other = PolicyConfig(policy_weight=0.0)  # what is left of the update without the policy term
  spread = flat | {"host": jnp.tile(jnp.array([0.0, 1.0]), 6)}
  state, _, new, metrics, _ = _run(PolicyConfig(), flat)
  assert float(metrics["samples/kept"]) == 0 and float(metrics["loss/policy"]) == 0
  assert float(metrics["generator/update_norm"]) > 0
  _, _, want, _, _ = _run(other, spread, state=state)
  _same(new.generator, want.generator, 1e-6)


def test_the_largest_drift_of_all_micro_batches_is_reported():
  _, samples, *_ = _run(PolicyConfig())
  moved = samples.replace(log_prob=samples.log_prob.at[:, 4].add(-0.1))
  rewards = samples.rewards | toy.host_rewards(12)
  for parts in (1, 12):
    update = _programs(PolicyConfig(micro_batches=parts))[1]
    _, metrics = update(toy.state()[0], toy.frozen(), toy.batch(), moved, rewards, KEY)
    assert float(metrics["ratio/drift"]) == pytest.approx(np.expm1(0.1), rel=1e-4)


def test_absurd_rewards_count_as_failed_and_leave_the_means_alone():
  rewards = {"bright": jnp.linspace(0, 1, 12), "host": jnp.linspace(1, 0, 12)}
  for absurd in (jnp.inf, 1e30):
    wrong = rewards | {"host": rewards["host"].at[2].set(absurd)}
    _, _, new, metrics, _ = _run(PolicyConfig(), wrong)
    _, _, want, _, _ = _run(PolicyConfig(), rewards | {"host": rewards["host"].at[2].set(jnp.nan)})
    assert int(metrics["reward_failed/host"]) == 1 and 0 < float(metrics["reward/host"]) < 1
    _same(new.generator, want.generator, 0)


def test_a_failed_sample_is_left_out():
  rewards = {"bright": jnp.linspace(0, 1, 12), "host": jnp.linspace(1, 0, 12).at[2].set(jnp.nan)}
  _, _, new, metrics, _ = _run(PolicyConfig(), rewards)
  assert float(metrics["generator/skipped"]) == 0
  assert np.isfinite(np.asarray(new.generator["b"])).all()
  assert np.isfinite(float(metrics["reward/host"]))


def test_samples_that_a_toy_reward_fails_on_do_not_steer_the_update():
  """A failed sample is absent: neither its trajectory nor a fake 0 reaches the generator."""
  policy = PolicyConfig(dmd_weight=0.0, reward_weight=0.0)
  failed = np.array([1, 5, 6])
  host = np.linspace(0, 1, 12, dtype=np.float32) ** 2
  host[failed] = np.nan
  rewards = {"bright": jnp.where(jnp.isnan(host), jnp.nan, 0.0), "host": jnp.asarray(host)}
  state, samples, new, metrics, _ = _run(policy, rewards)
  assert int(metrics["reward_failed/host"]) == 3 and float(metrics["generator/skipped"]) == 0
  assert float(metrics["samples/kept"]) == pytest.approx(9 / 12)
  assert float(metrics["reward/host"]) == pytest.approx(np.nanmean(host), rel=1e-6)

  update = _programs(policy)[1]
  moved = samples.replace(x=samples.x.at[:, failed].add(1.0))
  other, _ = update(state, toy.frozen(), toy.batch(), moved, rewards, KEY)
  _same(new.generator, other.generator, 1e-6)
  zeros = rewards | {"host": jnp.nan_to_num(rewards["host"])}
  faked, _ = update(state, toy.frozen(), toy.batch(), samples, zeros, KEY)
  with pytest.raises(AssertionError):
    _same(new.generator, faked.generator, 1e-6)


def test_a_batch_that_failed_as_a_whole_changes_nothing():
  nothing = jnp.full(12, jnp.nan)
  state, _, new, metrics, _ = _run(PolicyConfig(), {"bright": nothing, "host": nothing})
  assert int(metrics["reward_failed/host"]) == 12 and float(metrics["samples/kept"]) == 0
  _same(state.generator, new.generator, 0)


def test_reward_back_propagation_raises_the_reward():
  policy = PolicyConfig(dmd_weight=0.0, policy_weight=0.0, reward_weight=1.0)
  state, samples, new, _, _ = _run(policy)
  _, later, *_ = _run(policy, state=state.replace(generator=new.generator))
  assert float(later.rewards["bright"].mean()) > float(samples.rewards["bright"].mean())


def test_back_propagated_gradient_equals_finite_differences():
  x0 = jax.random.normal(KEY, (12, *toy.SHAPE))
  text = {"bright": jnp.ones((12, 1))}
  found = lambda x: score_latents(x, text, toy.frozen(), toy.scoring(), ("bright",))  # noqa: E731
  direction = jax.random.normal(jax.random.key(9), x0.shape)
  with jax.enable_x64(True):
    h = 1e-3
    ends = (found(x0 + sign * h * direction).weighted_reward.sum() for sign in (1, -1))
    numeric = (next(ends) - next(ends)) / (2 * h)
  analytic = jnp.sum(found(x0).reward_grad * direction)
  np.testing.assert_allclose(analytic, numeric, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [{"kl_weight": 0.1}, {"gaussian_log_prob": True}, {"subset_factor": True}, {"global_std": False}],
)
def test_options_run_and_change_the_update(changes):
  plain, changed = (_run(PolicyConfig(**c)) for c in ({}, changes))
  difference = jax.tree.map(
    lambda a, b: jnp.abs(a - b).max(), plain[2].generator, changed[2].generator
  )
  assert max(jax.tree.leaves(difference)) > 0
  if "kl_weight" in changes:
    assert float(changed[3]["loss/kl"]) > 0


@pytest.mark.slow
def test_settings_of_the_policy_that_a_weight_of_0_leaves_out_change_nothing():
  """Those that `unused_settings` names although the program differs."""
  changes = dict(advantage_limit=0.1, kl_weight=0.1, subset_factor=True, gaussian_log_prob=True)
  plain, changed = (_run(PolicyConfig(policy_weight=0.0, **c))[2].generator for c in ({}, changes))
  _same(plain, changed, 1e-6)
