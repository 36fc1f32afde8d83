"""A run's stage: its programs, the state that they update, and the step made of them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rtdmd_jax.datasets.prompts import Prompt
from rtdmd_jax.rewards.per_process import score_local_rows
from rtdmd_jax.runtime.sharding import constrain_by_rules, replicate
from rtdmd_jax.training.batch import make_batch
from rtdmd_jax.training.describe import new_adapters
from rtdmd_jax.training.optim import Optimizers, effective_decay, ema_update, make_optimizer
from rtdmd_jax.training.programs import Program, compile_programs
from rtdmd_jax.training.setup import Setup
from rtdmd_jax.training.stage1 import Stage1
from rtdmd_jax.training.stage2 import Stage2
from rtdmd_jax.training.state import Batch, Metrics, TrainState
from rtdmd_jax.training.typed_config import (
  dmd_config,
  micro_batches,
  optimizer_config,
  policy_config,
)

STAGES = ("stage1", "stage2")

# (state, batch, prompts of the samples, number) -> (state, metrics); metrics stay on the device.
StepFn = Callable[[TrainState, Batch, Sequence[Prompt], int], tuple[TrainState, Metrics]]
# Maps a stage's compiled programs to those that a step calls in their place.
Watch = Callable[[dict[str, Callable]], dict[str, Callable]]


def make_optimizers(config: Any) -> Optimizers:
  """The optimizers of both networks."""
  return Optimizers(
    make_optimizer(optimizer_config(config.generator)),
    make_optimizer(optimizer_config(config.fake_score)),
  )


def initial_state(config: Any, setup: Setup) -> TrainState:
  """New adapters, which change nothing, and empty optimizer states."""
  keys = jax.random.split(jax.random.key(config.seed), 2)
  generator = new_adapters(config, setup.pipeline, keys[0])
  fake_score = new_adapters(config, setup.pipeline, keys[1])
  optimizers = make_optimizers(config)
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    generator=generator,
    fake_score=fake_score,
    ema=jax.tree.map(lambda a: jnp.copy(a.astype(jnp.float32)), generator),
    generator_opt=optimizers.generator.init(generator),
    fake_score_opt=optimizers.fake_score.init(fake_score),
  )
  return constrain_by_rules(state)


def make_stage(config: Any, setup: Setup) -> Stage1 | Stage2:
  """The stage that `config.stage` names."""
  fixed = {
    "roles": setup.roles,
    "dmd": dmd_config(config, setup.pipeline),
    "optimizers": make_optimizers(config),
  }
  ratio = config.train.fake_update_ratio
  if config.stage == "stage1":
    return Stage1(**fixed, micro_batches=micro_batches(config), fake_update_ratio=ratio)
  return Stage2(
    **fixed, policy=policy_config(config), rewards=setup.scoring, fake_score_updates=ratio
  )


def finish_program(average: Any) -> Program:
  """The end of a step: moving average and step count.

  Args:
    average: `config.ema`.
  """

  def finish(state: TrainState) -> TrainState:
    step = state.step + 1
    decay = effective_decay(
      average.decay, step, warmup=average.warmup, applications=average.applications
    )
    # The published loop's phase: of every 8 steps the seventh, fifteenth, ...
    ema = ema_update(state.ema, state.generator, decay, (step + 1) % average.every == 0)
    return state.replace(step=step, ema=ema)

  return Program("finish", finish, ("state",), stream=None)


def step_programs(config: Any, setup: Setup) -> tuple[Program, ...]:
  """All programs of a training step, in the order in which they run."""
  return (*make_stage(config, setup).programs, finish_program(config.ema))


def make_step(config: Any, setup: Setup, watch: Watch = dict) -> StepFn:
  """A training step of compiled programs.

  Args:
    config: of the run.
    setup: everything that the run reads.
    watch: may count or time the programs' calls.
  """
  stage = make_stage(config, setup)
  programs = (*stage.programs, finish_program(config.ema))
  compiled = compile_programs(programs, config.seed, check_numbers=config.train.check_numbers)
  run = watch(compiled)

  def step(state: TrainState, batch: Batch, prompts: Sequence[Prompt], number: int):
    if isinstance(stage, Stage1):
      state, metrics = stage.step(run, state, setup.frozen, batch, number)
    else:
      score = _host_scores(setup, prompts)
      state, metrics = stage.step(run, state, setup.frozen, batch, score)
    return run["finish"](state), metrics

  return step


def step_batch(config: Any, setup: Setup, number: int) -> tuple[Batch, list[Prompt]]:
  """The batch of step `number` of a run, and the prompt of each sample."""
  return make_batch(
    setup.prompts,
    setup.cache,
    setup.unconditional,
    seed=config.seed,
    step=number,
    prompts_per_batch=config.batch.prompts,
    images_per_prompt=config.batch.images_per_prompt,
  )


def _host_scores(
  setup: Setup, prompts: Sequence[Prompt]
) -> Callable[[jax.Array], dict[str, jax.Array]] | None:
  """Scores a rollout's images by the rewards that are not on the device; None without any."""
  if setup.host_rewards is None:
    return None
  return lambda images: replicate(score_local_rows(setup.host_rewards, images, prompts))
