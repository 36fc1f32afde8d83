"""The training loop, one for both stages: build, restore, step, log, evaluate, save."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rtdmd_jax.config import flatten
from rtdmd_jax.datasets.prompts import Prompt
from rtdmd_jax.evaluate.evaluator import Evaluator
from rtdmd_jax.evaluate.finish import facts_of, finish, is_finished, say_finished
from rtdmd_jax.evaluate.held_out import evaluate
from rtdmd_jax.export import export_adapters
from rtdmd_jax.pipeline.text import cut_prompts
from rtdmd_jax.rewards.per_process import score_local_rows
from rtdmd_jax.runtime import multihost, sharding
from rtdmd_jax.runtime.checked_jit import checked_jit
from rtdmd_jax.runtime.checkpoint import Checkpoints
from rtdmd_jax.runtime.compilation import enable_compilation_cache
from rtdmd_jax.runtime.files import replace_text
from rtdmd_jax.runtime.lock import WorkdirLock
from rtdmd_jax.runtime.metrics import MetricWriter, markdown
from rtdmd_jax.runtime.preemption import Preemption
from rtdmd_jax.runtime.profiling import profiled
from rtdmd_jax.runtime.progress import Progress
from rtdmd_jax.runtime.sharding import constrain_by_rules, make_mesh, replicate
from rtdmd_jax.runtime.throughput import Meter, peak_tflops
from rtdmd_jax.runtime.wandb_log import WandbRun, import_wandb
from rtdmd_jax.training import stage1, stage2
from rtdmd_jax.training.batch import make_batch
from rtdmd_jax.training.fingerprints import of_files, of_weights, overlap, prompt_sets
from rtdmd_jax.training.idle import warnings
from rtdmd_jax.training.nonfinite import NonFiniteGuard, scalars
from rtdmd_jax.training.optim import effective_decay, ema_update, make_optimizer
from rtdmd_jax.training.resume import FIXED as FIXED  # check.py looks for it here
from rtdmd_jax.training.resume import check_start, restore, store_config, versions
from rtdmd_jax.training.setup import (
  Setup,
  build,
  dmd_config,
  micro_batches,
  new_adapters,
  optimizer_config,
  policy_config,
)
from rtdmd_jax.training.state import Batch, Metrics, TrainState
from rtdmd_jax.training.validate import check_limits, check_stage

# (state, batch, prompts, step) -> (state, metrics); metrics stay on the device.
StepFn = Callable[[TrainState, Batch, list[Prompt], int], tuple[TrainState, Metrics]]
# Takes a stage's programs and gives what a step calls in their place.
Watch = Callable[[dict[str, Callable]], dict[str, Callable]]


class Optimizers(NamedTuple):
  """One optimizer a trained network."""

  generator: Any
  fake_score: Any


def initial_state(config: Any, setup: Setup, optimizers: Optimizers) -> TrainState:
  """Fresh adapters, which change nothing, and empty optimizer states."""
  keys = jax.random.split(jax.random.key(config.seed), 2)
  generator = new_adapters(config, setup.pipeline, keys[0])
  fake_score = new_adapters(config, setup.pipeline, keys[1])
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    generator=generator,
    fake_score=fake_score,
    ema=jax.tree.map(lambda a: jnp.copy(a.astype(jnp.float32)), generator),
    generator_opt=optimizers.generator.init(generator),
    fake_score_opt=optimizers.fake_score.init(fake_score),
  )
  return constrain_by_rules(state)


def step_batch(config: Any, setup: Setup, number: int) -> tuple[Batch, list[Prompt]]:
  """What step `number` of a run trains on: its batch, and the prompt of each sample."""
  return make_batch(
    setup.prompts,
    setup.cache,
    setup.unconditional,
    seed=config.seed,
    step=number,
    prompts_per_batch=config.batch.prompts,
    images_per_prompt=config.batch.images_per_prompt,
  )


def _keyed(step: Callable, seed: int, stream: int) -> Callable:
  """Derives the step's key from the seed and `state.step` inside the compiled program."""

  def run(state: TrainState, frozen: Any, *args: Any) -> Any:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), state.step)
    out = step(state, frozen, *args, key)
    # The state stays where it is, so that the next step finds it where it was compiled for.
    if isinstance(out, tuple) and isinstance(out[0], TrainState):
      return (constrain_by_rules(out[0]), *out[1:])
    return out

  return run


def _finish(config: Any) -> Callable[[TrainState], TrainState]:
  """The end of a step: moving average and step count."""
  average = config.ema

  def finish(state: TrainState) -> TrainState:
    step = state.step + 1
    decay = effective_decay(
      average.decay, step, warmup=average.warmup, applications=average.applications
    )
    # The published loop's phase: of every 8 steps the seventh, fifteenth, ...
    ema = ema_update(state.ema, state.generator, decay, (step + 1) % average.every == 0)
    return constrain_by_rules(state.replace(step=step, ema=ema))

  return jax.jit(finish, donate_argnums=0)


def stage1_programs(config: Any, setup: Setup, optimizers: Optimizers) -> dict[str, Callable]:
  """The compiled programs of a step by name, each of (state, frozen, batch) but `finish`."""
  common = {
    "roles": setup.roles,
    "config": dmd_config(config, setup.pipeline),
    "micro_batches": micro_batches(config),
  }

  def fake(state, frozen, batch, key):
    return stage1.fake_score_step(
      state, frozen, batch, key, optimizer=optimizers.fake_score, **common
    )

  def generator(state, frozen, batch, key):
    return stage1.generator_step(
      state, frozen, batch, key, optimizer=optimizers.generator, **common
    )

  compiled = partial(checked_jit, check=config.train.check_numbers)
  return {
    "fake_score": compiled(_keyed(fake, config.seed, 1), donate_argnums=0),
    "generator": compiled(_keyed(generator, config.seed, 2), donate_argnums=0),
    "finish": _finish(config),
  }


def stage1_step(config: Any, setup: Setup, optimizers: Optimizers, watch: Watch = dict) -> StepFn:
  """A fake-score update every step, a generator update every `fake_update_ratio`-th."""
  programs = watch(stage1_programs(config, setup, optimizers))

  def step(state: TrainState, batch: Batch, prompts: list[Prompt], number: int):
    state, metrics = programs["fake_score"](state, setup.frozen, batch)
    if (number + 1) % config.train.fake_update_ratio == 0:
      state, more = programs["generator"](state, setup.frozen, batch)
      metrics |= more
    return programs["finish"](state), metrics

  return step


def stage2_programs(config: Any, setup: Setup, optimizers: Optimizers) -> dict[str, Callable]:
  """The compiled programs of a step by name, of (state, frozen, batch) and earlier results.

  `fake_score` also takes `rollout`'s samples, `policy` those and the rewards, `finish` the state
  alone.
  """
  dmd, policy = dmd_config(config, setup.pipeline), policy_config(config)
  common = {"roles": setup.roles, "config": dmd, "policy": policy}

  def roll_out(state, frozen, batch, key):
    return stage2.collect_rollout(state, frozen, batch, key, scoring=setup.scoring, **common)

  def fake(state, frozen, batch, samples, key):
    return stage2.fake_score_step(
      state, frozen, batch, samples, key,
      optimizer=optimizers.fake_score, updates=config.train.fake_update_ratio, **common,
    )  # fmt: skip

  def update(state, frozen, batch, samples, rewards, key):
    return stage2.policy_step(
      state,
      frozen,
      batch,
      samples,
      rewards,
      key,
      scoring=setup.scoring,
      optimizer=optimizers.generator,
      **common,
    )

  compiled = partial(checked_jit, check=config.train.check_numbers)
  return {
    "rollout": compiled(_keyed(roll_out, config.seed, 3)),
    "fake_score": compiled(_keyed(fake, config.seed, 1), donate_argnums=0),
    "policy": compiled(_keyed(update, config.seed, 2), donate_argnums=0),
    "finish": _finish(config),
  }


def stage2_step(config: Any, setup: Setup, optimizers: Optimizers, watch: Watch = dict) -> StepFn:
  """Rollout, `fake_update_ratio` fake-score updates while the host scores, policy update."""
  programs = watch(stage2_programs(config, setup, optimizers))

  def step(state: TrainState, batch: Batch, prompts: list[Prompt], number: int):
    samples, metrics = programs["rollout"](state, setup.frozen, batch), {}
    if config.policy.dmd_weight:  # else nothing asks for the fake score
      state, metrics = programs["fake_score"](state, setup.frozen, batch, samples)
    rewards = dict(samples.rewards)
    if setup.host_rewards is not None:
      rewards |= replicate(score_local_rows(setup.host_rewards, samples.images, prompts))
    state, more = programs["policy"](state, setup.frozen, batch, samples, rewards)
    return programs["finish"](state), metrics | more

  return step


STAGES = {"stage1": stage1_step, "stage2": stage2_step}
PROGRAMS = {"stage1": stage1_programs, "stage2": stage2_programs}


def train(config: Any, workdir: Path, *, allow_config_change: bool = False) -> None:
  """Runs a stage to its end in `workdir`, from its last checkpoint if it has one.

  Of a finished run only the report is written anew.

  Args:
    config: of the stage.
    workdir: folder of the run.
    allow_config_change: resume although the objective, the backbone, the adapters or the content of
      what is read changed.

  Raises:
    UserError: a bad configuration, a missing or broken file, or a workdir that another run is using
      or that holds the checkpoints of another one.
    Stopped: a signal came, or too many updates in a row were not finite.
  """
  check_stage(config)
  with multihost.silence_other_processes():
    settings = json.loads(config.to_json_best_effort())
    multihost.assert_equal(
      {"config": settings, "versions": versions(), "code": multihost.code_digest()}
    )
    check_limits(config)
    for sentence in warnings(config):
      print(f"warning: {sentence}")
    if config.log.wandb:
      import_wandb()
    with (
      jax.set_mesh(make_mesh(**config.mesh)),
      ExitStack() as held,
      Preemption(config.train.grace_seconds) as stop,
    ):
      with multihost.raise_on_all_processes():
        if multihost.is_main():
          held.enter_context(WorkdirLock(workdir))
      _train(config, settings, workdir, stop, allow_config_change)
      multihost.gather(None)  # process 0 has written everything


def _train(config: Any, settings: dict, workdir: Path, stop: Preemption, allow: bool) -> None:
  enable_compilation_cache(workdir)
  sets = prompt_sets(config)
  record = {"config": settings, "versions": versions(), "files": of_files(config, sets)}
  shared = overlap(sets)
  keep, keep_every = config.train.keep, config.train.keep_every or None
  with Checkpoints(workdir / "checkpoints", keep=keep, keep_every=keep_every) as saved:
    latest = saved.latest_step
    if latest is not None:
      check_start(saved, workdir, record, allow=allow)
      facts = facts_of(latest, settings, record["files"], shared)
      if latest >= config.train.steps and is_finished(workdir, facts):
        say_finished(workdir, latest)
        return
    setup = build(config)
    if multihost.is_main():
      store_config(workdir / "config.json", settings)
      replace_text(workdir / "versions.json", json.dumps(versions(), indent=2))
      _print_cut(setup)
    multihost.assert_equal({"files": record["files"], "newest checkpoint": latest})
    file = workdir / "config.json"
    multihost.assert_equal({str(file): multihost.file_digest(file)})
    optimizers = Optimizers(
      *(make_optimizer(optimizer_config(c)) for c in (config.generator, config.fake_score))
    )
    state = jax.jit(lambda: initial_state(config, setup, optimizers))()
    _print_placement(setup, state)
    record["weights"] = of_weights(setup)
    if latest is not None:
      state = restore(saved, state, record, allow=allow)
    meter = Meter(len(config.dmd.timesteps))
    step_fn = STAGES[config.stage](config, setup, optimizers, meter.watch)
    step_fn = profiled(step_fn, config.train, workdir)
    evaluator = Evaluator(setup, config)
    with _writer(config, int(state.step), record, workdir) as writer:
      state = _loop(
        config, setup, evaluator, step_fn, meter, state, saved, record, stop, writer, workdir
      )
      saved.wait()
      facts = facts_of(int(state.step), settings, record["files"], shared)
      finish(config, setup, evaluator, state, facts, writer, workdir)


def _print_cut(setup: Setup) -> None:
  """Says which prompts are too long for a text encoder."""
  sets = {"training prompts": setup.prompts}
  sets |= {f"held-out prompts of {part.path}": part.prompts for part in setup.held_out_sets}
  for what, prompts in sets.items():
    for line in cut_prompts(setup.pipeline.text.limits, [p.text for p in prompts], what):
      print(line)


def _print_placement(setup: Setup, state: TrainState) -> None:
  """Where everything lives, on a mesh of several devices."""
  mesh = sharding.current()
  if mesh is None or mesh.size == 1:
    return
  parts = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  print(f"mesh: {parts}")
  trees = {f"base {name}": base for name, base in setup.frozen.bases.items()}
  trees |= {f"reward {name}": params for name, params in setup.frozen.rewards.items()}
  trees |= {"autoencoder": setup.frozen.vae, "text encoders": setup.pipeline.text.params}
  trees |= {"training state": state}
  for name, count, total, local in sharding.table(trees, mesh):
    sizes = f"{total / 1e6:>10,.1f} MB  {local / 1e6:>10,.1f} MB a device"
    print(f"  {name:24s} {count:>14,} values  {sizes}")


def _loop(
  config: Any,
  setup: Setup,
  evaluator: Evaluator,
  step_fn: StepFn,
  meter: Meter,
  state: TrainState,
  saved: Checkpoints,
  record: dict[str, Any],
  stop: Preemption,
  writer: MetricWriter,
  workdir: Path,
) -> TrainState:
  start, last = int(state.step), config.train.steps
  samples, logged = config.batch.prompts * config.batch.images_per_prompt, start
  guard = NonFiniteGuard(config.train.max_skipped, state, record.pop("updates", {}))
  agreed = multihost.AsyncMax()
  counted, recent = 0.0, {}
  shown = Progress(
    last,
    start_step=start,
    peak_tflops=peak_tflops(),
    recomputes=config.model.remat != "none",
  )
  with shown as progress:
    for name in ("config", "versions"):
      writer.text(start, name, markdown(dict(flatten(record[name]))))
    if start == 0:
      evaluate(config, setup, evaluator, state, 0, writer, workdir)
    # A step takes its state's memory over, so between its parts there is nothing to save.
    with stop.deferred():
      for number in range(start, last):
        batch, prompts = step_batch(config, setup, number)
        state, metrics = step_fn(state, batch, prompts, number)
        done = number + 1
        guard.observe(done, metrics)
        recent |= metrics  # a network's last values, although it is not updated in every step
        if done % config.train.log_every == 0 or done == last:
          guard.flush()
          values, recent = scalars(recent) | guard.totals(), {}
          writer.scalars(done, values)
          progress.update(done, (done - logged) * samples, values, meter.tflop - counted)
          logged, counted = done, meter.tflop
        leaving = agreed(stop.number)
        if done % config.eval.every == 0 and not leaving:
          evaluate(config, setup, evaluator, state, done, writer, workdir)
          leaving = agreed(stop.number)
        saving = leaving or done % config.train.save_every == 0 or done == last
        if saving:
          guard.flush()
          saved.save(done, state, record | {"updates": guard.counts()})
        if leaving:
          saved.wait()
        if saving and (leaving or done < last):  # of the last step `finish` does it
          export_adapters(config, setup, state, workdir / "export")
        if leaving:
          stop.share(leaving)
          stop.stop(f"checkpoint {done} is saved; the same command goes on from it")
      stop.share(max(multihost.gather(stop.number)))
      guard.finish()
  return state


def _writer(config: Any, start: int, record: dict[str, Any], workdir: Path) -> MetricWriter:
  """Where the main process writes metrics; nothing in the other ones."""
  mirror = None
  if config.log.wandb and multihost.is_main():
    mirror = WandbRun(workdir, project=config.log.wandb_project, config=record["config"])
  return MetricWriter(workdir, resume_step=start or -1, active=multihost.is_main(), mirror=mirror)
