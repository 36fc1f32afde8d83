"""The cold start's steps on a backbone of one layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.training.optim import Optimizers
from rtdmd_jax.training.settings import Consistency, DMDConfig
from rtdmd_jax.training.stage1 import Stage1
from rtdmd_jax.training.velocities import generator_velocity, teacher_velocity
from tests.support import toy

KEY = jax.random.key(7)


def _stage(config, optimizer, **more):
  return Stage1(toy.roles(), config, Optimizers(optimizer, optimizer), **more)


def _steps(config, key=KEY, batch=None, frozen=None):
  state, optimizer = toy.state()
  batch = toy.batch() if batch is None else batch
  frozen = toy.frozen() if frozen is None else frozen
  stage = _stage(config, optimizer)
  fake = jax.jit(stage.fake_score_step)(state, frozen, batch, key)
  generator = jax.jit(stage.generator_step)(state, frozen, batch, key)
  return state, fake, generator


@pytest.mark.parametrize(
  "config",
  [
    DMDConfig(),
    DMDConfig(consistency=Consistency(weight=0.0)),
    DMDConfig(consistency=Consistency(transitions=2, two_sample=False)),
    DMDConfig(consistency=Consistency(adjacent=True)),
    DMDConfig(start_mode="fixed_boundary", inside=True),
    DMDConfig(objective="dmd"),
    DMDConfig(guidance_low=1.0, guidance_high=1.0, normalize=False, scale_out=False),
  ],
)
def test_each_step_moves_only_its_own_network(config):
  state, (after_fake, fake_metrics), (after_generator, generator_metrics) = _steps(config)
  moved = lambda old, new: float(jnp.abs(old["b"] - new["b"]).max())  # noqa: E731
  assert moved(state.fake_score, after_fake.fake_score) > 1e-4
  assert moved(state.generator, after_fake.generator) == 0
  assert moved(state.generator, after_generator.generator) > 1e-4
  assert moved(state.fake_score, after_generator.fake_score) == 0
  assert np.isfinite(float(fake_metrics["loss/fake_score"]))
  assert np.isfinite(float(generator_metrics["loss/generator"]))


@pytest.mark.parametrize("objective", ["ac_dmd", "dmd"])
def test_micro_batches_change_nothing(objective):
  config = DMDConfig(objective=objective)
  state, optimizer = toy.state()
  for step in ("fake_score_step", "generator_step"):
    (whole, metrics), (parts, others) = (
      jax.jit(getattr(_stage(config, optimizer, micro_batches=count), step))(
        state, toy.frozen(), toy.batch(), KEY
      )
      for count in (1, 4)
    )
    # Only the order of sums differs; Adam's first step turns rounding into at most its rate.
    for one, two in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
      np.testing.assert_allclose(one, two, atol=1e-4, rtol=0)
    for name in metrics:
      np.testing.assert_allclose(metrics[name], others[name], rtol=1e-5)


def test_generator_stands_still_when_fake_score_equals_teacher():
  config = DMDConfig(guidance_low=1.0, guidance_high=1.0)
  state, optimizer = toy.state()
  zero = jax.tree.map(jnp.zeros_like, state.fake_score)
  state = state.replace(fake_score=zero)
  new, metrics = jax.jit(_stage(config, optimizer).generator_step)(
    state, toy.frozen(), toy.batch(), KEY
  )
  assert float(metrics["generator/grad_norm"]) == 0
  np.testing.assert_array_equal(new.generator["b"], state.generator["b"])


def test_a_non_finite_gradient_skips_the_update():
  batch = toy.batch()
  batch = batch.replace(
    conditioning=batch.conditioning.replace(tokens=batch.conditioning.tokens.at[0].set(jnp.nan))
  )
  state, (after, metrics), _ = _steps(DMDConfig(consistency=Consistency(weight=0.0)), batch=batch)
  assert float(metrics["fake_score/skipped"]) == 1
  np.testing.assert_array_equal(after.fake_score["a"], state.fake_score["a"])
  assert int(after.fake_score_opt[1][0].count) == 0


def test_adapter_scale_is_alpha_over_rank():
  roles, frozen, batch = toy.roles(), toy.frozen(), toy.batch()
  conditioning = batch.conditioning.take(batch.prompt_index)
  x = jax.random.normal(KEY, (12, *toy.SHAPE))
  adapters = toy.adapters(3)
  velocity = generator_velocity(roles, frozen, adapters, conditioning)
  kernel = frozen.bases["base"]["kernel"] + 2.0 * adapters["a"] @ adapters["b"]
  text = conditioning.tokens.mean(1)[:, None, None]
  expected = jnp.tanh(x @ kernel) + text + 0.3 * 0.5
  np.testing.assert_allclose(velocity(x, jnp.full(12, 0.5)), expected, atol=1e-5)


def test_guidance_extrapolates_from_the_empty_prompt():
  roles, frozen, batch = toy.roles(), toy.frozen(), toy.batch()
  conditioning = batch.conditioning.take(batch.prompt_index)
  config = DMDConfig(guidance_low=3.0, guidance_high=3.0)
  velocity = teacher_velocity(roles, frozen, config, conditioning, batch.unconditional, KEY)
  x = jax.random.normal(KEY, (12, *toy.SHAPE))
  base = jnp.tanh(x @ frozen.bases["base"]["kernel"]) + 0.3 * 0.5
  text = conditioning.tokens.mean(1)[:, None, None]
  np.testing.assert_allclose(velocity(x, jnp.full(12, 0.5)), base + 3.0 * text, atol=1e-5)
