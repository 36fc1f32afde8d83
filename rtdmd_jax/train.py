"""The training loop, one for both stages: build, restore, step, log, evaluate, save."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rtdmd_jax import evaluation, hosts, sharding, stage1, stage2
from rtdmd_jax.build import (
  Setup,
  build,
  dmd_config,
  micro_batches,
  new_adapters,
  optimizer_config,
  policy_config,
)
from rtdmd_jax.checkpoint import Checkpoints
from rtdmd_jax.checksum import fingerprint
from rtdmd_jax.compilation import keep_programs
from rtdmd_jax.config import flatten
from rtdmd_jax.data import make_batch
from rtdmd_jax.errors import UserError
from rtdmd_jax.export import export_adapters
from rtdmd_jax.held_out import evaluate, final_evaluation
from rtdmd_jax.limits import check_limits
from rtdmd_jax.metrics import MetricWriter, markdown
from rtdmd_jax.numbers import checked_jit
from rtdmd_jax.optim import ema_update, make_optimizer
from rtdmd_jax.preemption import Preemption
from rtdmd_jax.profile import profiled
from rtdmd_jax.progress import Progress
from rtdmd_jax.prompts import Prompt
from rtdmd_jax.report import write_report
from rtdmd_jax.resume import (
  check_resume,
  check_weights,
  config_diff,
  read_stored_config,
  store_config,
  versions,
)
from rtdmd_jax.rewards.spread import score_held
from rtdmd_jax.sharding import make_mesh, pin, replicate
from rtdmd_jax.skips import Skips, scalars
from rtdmd_jax.stage1 import Batch, Metrics
from rtdmd_jax.state import TrainState
from rtdmd_jax.throughput import Meter, peak_tflops
from rtdmd_jax.unused_settings import settings_without_effect
from rtdmd_jax.wandb_log import WandbRun, import_wandb

# A resumed run must agree with itself in these sections.
FIXED = (
  *("stage", "seed", "lora", "load", "data.prompts", "data.held_out", "dmd", "policy", "rewards"),
  # Not batch.micro_batches, model.remat and model.attention, which only save memory.
  *("batch.prompts", "batch.repeats", "train.fake_update_ratio"),
  *(f"model.{key}" for key in ("pretrained", "image_size", "dtype", "base_storage")),
  *(f"model.{role}_init" for role in ("generator", "fake_score", "teacher")),
)

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
  return pin(state)


def step_batch(config: Any, setup: Setup, number: int) -> tuple[Batch, list[Prompt]]:
  """What step `number` of a run trains on: its batch, and the prompt of each sample."""
  return make_batch(
    setup.prompts,
    setup.cache,
    setup.unconditional,
    seed=config.seed,
    step=number,
    prompts_per_batch=config.batch.prompts,
    repeats=config.batch.repeats,
  )


def _keyed(step: Callable, seed: int, stream: int) -> Callable:
  """Derives the step's key from the seed and `state.step` inside the compiled program."""

  def run(state: TrainState, frozen: Any, *args: Any) -> Any:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), state.step)
    out = step(state, frozen, *args, key)
    # The state stays where it is, so that the next step finds it where it was compiled for.
    if isinstance(out, tuple) and isinstance(out[0], TrainState):
      return (pin(out[0]), *out[1:])
    return out

  return run


def _finish(config: Any) -> Callable[[TrainState], TrainState]:
  """The end of a step: moving average and step count."""

  def finish(state: TrainState) -> TrainState:
    step = state.step + 1
    ema = ema_update(state.ema, state.generator, config.ema.decay, step % config.ema.every == 0)
    return pin(state.replace(step=step, ema=ema))

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
    return stage2.rollout(state, frozen, batch, key, scoring=setup.scoring, **common)

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
    if config.policy.dm_weight:  # else nothing asks for the fake score
      state, metrics = programs["fake_score"](state, setup.frozen, batch, samples)
    rewards = dict(samples.rewards)
    if setup.host_rewards is not None:
      rewards |= replicate(score_held(setup.host_rewards, samples.images, prompts))
    state, more = programs["policy"](state, setup.frozen, batch, samples, rewards)
    return programs["finish"](state), metrics | more

  return step


STAGES = {"stage1": stage1_step, "stage2": stage2_step}
PROGRAMS = {"stage1": stage1_programs, "stage2": stage2_programs}


def train(config: Any, workdir: Path, *, allow_config_change: bool = False) -> None:
  """Runs a stage to its end in `workdir`, from its last checkpoint if it has one.

  Args:
    config: of the stage.
    workdir: folder of the run.
    allow_config_change: resume although the objective, the backbone or the adapters changed.

  Raises:
    UserError: a bad configuration, a missing or broken file, or a workdir of another run.
    Stopped: a signal came, or too many updates in a row were not finite.
  """
  with hosts.quiet():
    settings = json.loads(config.to_json_best_effort())
    hosts.agree({"config": settings, "versions": versions(), "code": hosts.code_digest()})
    with jax.set_mesh(make_mesh(**config.mesh)), Preemption(config.train.grace_seconds) as stop:
      _train(config, settings, workdir, stop, allow_config_change)
      hosts.gather(None)  # process 0 has written everything


def _train(config: Any, settings: dict, workdir: Path, stop: Preemption, allow: bool) -> None:
  if config.stage not in STAGES:
    raise UserError(f"stage is {config.stage!r}; use one of {', '.join(STAGES)} or pretrain.")
  check_limits(config)
  for sentence in settings_without_effect(config):
    print(f"warning: {sentence}")
  keep_programs(workdir)
  if config.log.wandb:
    import_wandb()
  workdir.mkdir(parents=True, exist_ok=True)
  keep, keep_every = config.train.keep, config.train.keep_every or None
  with Checkpoints(workdir / "checkpoints", keep=keep, keep_every=keep_every) as saved:
    if saved.latest_step is not None:
      _check_settings(saved, workdir, settings, allow)
    setup = build(config)
    if hosts.is_main():
      store_config(workdir / "config.json", settings)
      (workdir / "versions.json").write_text(json.dumps(versions(), indent=2))
    _agree_on_files(setup, saved, workdir)
    optimizers = Optimizers(
      *(make_optimizer(optimizer_config(c)) for c in (config.generator, config.fake_score))
    )
    state = jax.jit(lambda: initial_state(config, setup, optimizers))()
    _print_placement(setup, state)
    record = {"config": settings, "versions": versions(), "weights": _weights(setup)}
    if saved.latest_step is not None:
      state = _restore(saved, state, record, allow)
    meter = Meter(len(config.dmd.steps))
    step_fn = STAGES[config.stage](config, setup, optimizers, meter.watch)
    step_fn = profiled(step_fn, config.train, workdir)
    evaluator = evaluation.Evaluator(setup, config)
    state = _loop(config, setup, evaluator, step_fn, meter, state, saved, record, stop, workdir)
  final_evaluation(config, setup, evaluator, state, workdir)
  export_adapters(config, setup, state, workdir / "export")
  if hosts.is_main():
    print(f"report: {write_report(workdir)}")


def _agree_on_files(setup: Setup, saved: Checkpoints, workdir: Path) -> None:
  """Stops processes with other prompts, or with a workdir of their own."""
  prompts = {"data.prompts": setup.prompts, "data.held_out": setup.held_out}
  hosts.agree(
    {name: hosts.digest([p.record for p in values]) for name, values in prompts.items()}
    | {"newest checkpoint": saved.latest_step}
  )
  file = workdir / "config.json"
  hosts.agree({str(file): hosts.file_digest(file)})


def _check_settings(saved: Checkpoints, workdir: Path, settings: dict, allow: bool) -> None:
  """Before anything is loaded: may the newest checkpoint go on with these settings?"""
  old = saved.read_extra()
  # Checkpoints of earlier versions carry nothing; their configuration lies beside them.
  stored = old["config"] if "config" in old else read_stored_config(workdir / "config.json")
  name = f"{workdir / 'checkpoints' / str(saved.latest_step)}"
  for line in check_resume(name, stored, settings, FIXED, allow=allow):
    print(f"changed since the last start: {line}")
  for line in config_diff(old.get("versions", {}), versions()):
    print(f"changed since the last start, results may differ in the last bits: {line}")


def _restore(saved: Checkpoints, state: TrainState, record: dict, allow: bool) -> TrainState:
  state, old = saved.restore(state)
  if "weights" in old:
    for line in check_weights(f"step {state.step}", old["weights"], record["weights"], allow=allow):
      print(f"changed since the last start: {line}")
  print(f"resuming after step {int(state.step)}")
  record["updates"] = old.get("updates", {})
  return state


def _weights(setup: Setup) -> dict[str, str]:
  """Fingerprints of the frozen weights that the adapters belong to."""
  roles, frozen = setup.roles, setup.frozen
  trees = {
    role: frozen.bases[getattr(roles, role)] for role in ("generator", "fake_score", "teacher")
  }
  trees |= {"load.generator": frozen.generator, "load.fake_score": frozen.fake_score}
  return {name: fingerprint(tree) for name, tree in trees.items()}


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
  evaluator: evaluation.Evaluator,
  step_fn: StepFn,
  meter: Meter,
  state: TrainState,
  saved: Checkpoints,
  record: dict[str, Any],
  stop: Preemption,
  workdir: Path,
) -> TrainState:
  start, last = int(state.step), config.train.steps
  writer = _writer(config, start, record, workdir)
  samples, logged = config.batch.prompts * config.batch.repeats, start
  skips = Skips(config.train.max_skipped, state, record.pop("updates", {}))
  agreed = hosts.Agreement()
  counted, recent = 0.0, {}
  shown = Progress(
    last,
    start_step=start,
    peak_tflops=peak_tflops(),
    recomputes=config.model.remat != "none",
  )
  with writer, shown as progress:
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
        skips.follow(done, metrics)
        recent |= metrics  # a network's last values, although it is not updated in every step
        if done % config.train.log_every == 0 or done == last:
          skips.look()
          values, recent = scalars(recent) | skips.totals(), {}
          writer.scalars(done, values)
          progress.update(done, (done - logged) * samples, values, meter.tflop - counted)
          logged, counted = done, meter.tflop
        leaving = agreed(stop.number)
        if done % config.eval.every == 0 and not leaving:
          evaluate(config, setup, evaluator, state, done, writer, workdir)
          leaving = agreed(stop.number)
        if leaving or done % config.train.save_every == 0 or done == last:
          skips.look()
          saved.save(done, state, record | {"updates": skips.counts()})
        if leaving:
          saved.wait()
          stop.share(leaving)
          stop.stop(f"checkpoint {done} is saved; the same command goes on from it")
      stop.share(max(hosts.gather(stop.number)))
      skips.finish()
  return state


def _writer(config: Any, start: int, record: dict[str, Any], workdir: Path) -> MetricWriter:
  """Where the main process writes metrics; nothing in the other ones."""
  mirror = None
  if config.log.wandb and hosts.is_main():
    mirror = WandbRun(workdir, project=config.log.wandb_project, config=record["config"])
  return MetricWriter(workdir, resume_step=start or -1, active=hosts.is_main(), mirror=mirror)
