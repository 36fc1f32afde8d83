"""The end of a run: export, final evaluation, model card and report, each of them once."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rtdmd_jax.adapters.peft import read_notes
from rtdmd_jax.evaluate.evaluator import Evaluator
from rtdmd_jax.evaluate.held_out import final_evaluation
from rtdmd_jax.export import export_adapters, write_run_card
from rtdmd_jax.report.model_card import read_scores
from rtdmd_jax.report.page import write_report
from rtdmd_jax.runtime import multihost
from rtdmd_jax.runtime.files import replace_text
from rtdmd_jax.runtime.metrics import MetricWriter
from rtdmd_jax.training.setup import Setup
from rtdmd_jax.training.state import TrainState
from rtdmd_jax.training.stored_run import generator_weights

# Of a configuration, what a final evaluation depends on beside the weights.
_SCORED = ("stage", "seed", "model", "lora", "load", "data", "dmd", "rewards", "eval")


def facts_of(
  step: int,
  settings: Mapping[str, Any],
  files: Mapping[str, str],
  overlap: Mapping[str, Any] | None,
) -> dict[str, Any]:
  """The facts about a run that `evaluation.json` has under `"run"`.

  Args:
    step: of the weights that are scored.
    settings: the configuration as nested dicts.
    files: fingerprints of what it reads.
    overlap: see `fingerprints.overlap`.
  """
  scored = {key: settings[key] for key in _SCORED}
  return {"step": step, "settings": multihost.digest([scored, dict(files)]), "overlap": overlap}


def is_finished(workdir: Path, facts: Mapping[str, Any]) -> bool:
  """Whether export and final evaluation of this step and configuration are there.

  All processes of a run call this, and process 0 looks.
  """
  exported = read_notes(workdir / "export/generator").get("step") == str(facts["step"])
  return multihost.gather(exported and _is_evaluated(workdir, facts))[0]


def say_finished(workdir: Path, step: int) -> None:
  """Says where everything of a finished run is, and writes its report anew."""
  if multihost.is_main():
    print(
      f"this run is finished: step {step:,}, adapters in {workdir / 'export'}, scores in"
      f" {workdir / 'evaluation.json'}; raise train.steps to train on"
    )
    print(f"report: {write_report(workdir)}")


def finish(
  config: Any,
  setup: Setup,
  evaluator: Evaluator,
  state: TrainState,
  facts: Mapping[str, Any],
  writer: MetricWriter,
  workdir: Path,
) -> None:
  """Exports, then scores what was exported if that was not done already, and reports.

  Args:
    config: of the run.
    setup: what it reads.
    evaluator: of its held-out prompts.
    state: after the last step.
    facts: see `facts_of`.
    writer: gets every score as `final/<system>/<reward>`.
    workdir: of the run.
  """
  export_adapters(config, setup, state, workdir / "export")
  if not multihost.gather(_is_evaluated(workdir, facts))[0]:
    exported, _ = generator_weights(state.ema, state.generator, config.ema)
    final_evaluation(config, setup, evaluator, state.replace(ema=exported), workdir)
    if multihost.is_main():
      file = workdir / "evaluation.json"
      table = json.loads(file.read_text(encoding="utf-8")) | {"run": dict(facts)}
      writer.scalars(facts["step"], final_scores(table))
      write_run_card(config, setup, workdir / "export", table)
      # Last, for by this a later start knows that nothing is left to do.
      replace_text(file, json.dumps(table, indent=2))
  if multihost.is_main():
    print(f"report: {write_report(workdir)}")


def final_scores(evaluation: Mapping[str, Any]) -> dict[str, float]:
  """Means of `evaluation.json` as metrics `final/<system>/<reward>`, NaN where none was scored.

  Letters, digits, dots and dashes of a system's name stay, everything else is an underscore.
  """
  means = {}
  for system in evaluation["systems"]:
    name = re.sub(r"[^\w.-]+", "_", system["name"])
    for reward, score in system["scores"].items():
      means[f"final/{name}/{reward}"] = math.nan if score["mean"] is None else score["mean"]
  return means


def _is_evaluated(workdir: Path, facts: Mapping[str, Any]) -> bool:
  return (read_scores(workdir) or {}).get("run") == dict(facts)
