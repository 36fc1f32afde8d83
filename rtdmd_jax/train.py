"""The training loop, one for both stages: build, restore, step, log, evaluate, save."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from rtdmd_jax.config import flatten
from rtdmd_jax.evaluate.evaluator import Evaluator
from rtdmd_jax.evaluate.finish import facts_of, finish, is_finished, say_finished
from rtdmd_jax.evaluate.held_out import evaluate
from rtdmd_jax.export import export_adapters
from rtdmd_jax.runtime import multihost
from rtdmd_jax.runtime.checkpoint import Checkpoints
from rtdmd_jax.runtime.compilation import enable_compilation_cache
from rtdmd_jax.runtime.files import replace_text
from rtdmd_jax.runtime.lock import WorkdirLock
from rtdmd_jax.runtime.metrics import MetricWriter, markdown
from rtdmd_jax.runtime.preemption import Preemption
from rtdmd_jax.runtime.profiling import profiled
from rtdmd_jax.runtime.progress import Progress
from rtdmd_jax.runtime.sharding import make_mesh
from rtdmd_jax.runtime.throughput import Meter, peak_tflops
from rtdmd_jax.runtime.wandb_log import WandbRun, import_wandb
from rtdmd_jax.training.fingerprints import of_files, of_weights, overlap, prompt_sets
from rtdmd_jax.training.idle import warnings
from rtdmd_jax.training.nonfinite import NonFiniteGuard, scalars
from rtdmd_jax.training.overview import print_cut_prompts, print_placement
from rtdmd_jax.training.resume import check_start, restore, store_config, versions
from rtdmd_jax.training.setup import Setup, build
from rtdmd_jax.training.stages import StepFn, initial_state, make_step, step_batch
from rtdmd_jax.training.state import TrainState
from rtdmd_jax.training.validate import check_limits, check_stage


@dataclass(frozen=True)
class Run:
  """A run that is set up.

  Attributes:
    config: its configuration.
    workdir: its folder.
    record: what its checkpoints carry beside the state: config, versions, fingerprints.
    setup: everything that it reads.
    evaluator: of its held-out prompts.
    saved: its checkpoints.
    stop: the signals that end it.
    writer: of its metrics.
  """

  config: Any
  workdir: Path
  record: dict[str, Any]
  setup: Setup
  evaluator: Evaluator
  saved: Checkpoints
  stop: Preemption
  writer: MetricWriter

  def evaluate(self, state: TrainState, step: int) -> None:
    """Scores held-out prompts."""
    evaluate(self.config, self.setup, self.evaluator, state, step, self.writer, self.workdir)

  def export(self, state: TrainState) -> None:
    """Writes the adapters as PEFT files."""
    export_adapters(self.config, self.setup, state, self.workdir / "export")


def train(config: Any, workdir: Path, *, allow_config_change: bool = False) -> None:
  """Runs a stage to its end in `workdir`, from its last checkpoint if it has one.

  Of a finished run only the report is written anew.

  Args:
    config: the stage's.
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
      ExitStack() as locks,
      Preemption(config.train.grace_seconds) as stop,
    ):
      with multihost.raise_on_all_processes():
        if multihost.is_main():
          locks.enter_context(WorkdirLock(workdir))
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
      print_cut_prompts(setup)
    _assert_same_start(record, latest, workdir / "config.json")
    state = jax.jit(lambda: initial_state(config, setup))()
    print_placement(setup, state)
    record["weights"] = of_weights(setup)
    if latest is not None:
      state = restore(saved, state, record, allow=allow)
    meter = Meter(len(config.dmd.timesteps))
    step_fn = profiled(make_step(config, setup, meter.watch), config.train, workdir)
    evaluator = Evaluator(setup, config)
    with _writer(config, int(state.step), record, workdir) as writer:
      run = Run(config, workdir, record, setup, evaluator, saved, stop, writer)
      state = _loop(run, step_fn, meter, state)
      saved.wait()
      facts = facts_of(int(state.step), settings, record["files"], shared)
      finish(config, setup, evaluator, state, facts, writer, workdir)


def _assert_same_start(record: Mapping[str, Any], latest: int | None, file: Path) -> None:
  """Ends all processes where they read other files or see another workdir."""
  multihost.assert_equal({"files": record["files"], "newest checkpoint": latest})
  multihost.assert_equal({str(file): multihost.file_digest(file)})


def _loop(run: Run, step_fn: StepFn, meter: Meter, state: TrainState) -> TrainState:
  """Steps from the state's to the last one; returns the state after it."""
  config, writer, stop = run.config, run.writer, run.stop
  start, last = int(state.step), config.train.steps
  samples, logged = config.batch.prompts * config.batch.images_per_prompt, start
  guard = NonFiniteGuard(config.train.max_skipped, state, run.record.pop("updates", {}))
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
      writer.text(start, name, markdown(dict(flatten(run.record[name]))))
    if start == 0:
      run.evaluate(state, 0)
    # A step takes its state's memory over, so between its parts there is nothing to save.
    with stop.deferred():
      for number in range(start, last):
        batch, prompts = step_batch(config, run.setup, number)
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
          run.evaluate(state, done)
          leaving = agreed(stop.number)
        saving = leaving or done % config.train.save_every == 0 or done == last
        if saving:
          guard.flush()
          run.saved.save(done, state, run.record | {"updates": guard.counts()})
        if leaving:
          run.saved.wait()
        if saving and (leaving or done < last):  # of the last step `finish` does it
          run.export(state)
        if leaving:
          stop.share(leaving)
          stop.stop(f"checkpoint {done} is saved; the same command goes on from it")
      stop.share(max(multihost.gather(stop.number)))
      guard.finish()
  return state


def _writer(config: Any, start: int, record: dict[str, Any], workdir: Path) -> MetricWriter:
  """The writer of the main process's metrics; one that writes nothing in the other processes."""
  mirror = None
  if config.log.wandb and multihost.is_main():
    mirror = WandbRun(workdir, project=config.log.wandb_project, config=record["config"])
  return MetricWriter(workdir, resume_step=start or -1, active=multihost.is_main(), mirror=mirror)
