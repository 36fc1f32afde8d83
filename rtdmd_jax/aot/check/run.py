"""A run described and checked as a whole."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from rtdmd_jax.aot.check import hardware
from rtdmd_jax.aot.check.files import Prompts, check_workdir, read_prompts
from rtdmd_jax.aot.check.networks import check_networks
from rtdmd_jax.aot.check.programs import check_programs
from rtdmd_jax.aot.check.report import Report
from rtdmd_jax.aot.check.rewards import check_rewards
from rtdmd_jax.datasets.prompts import Prompt
from rtdmd_jax.errors import UserError
from rtdmd_jax.pipeline.describe import text_limits
from rtdmd_jax.pipeline.text import cut_prompts
from rtdmd_jax.runtime import gpu_memory
from rtdmd_jax.runtime.wandb_log import import_wandb
from rtdmd_jax.training.describe import ROLES
from rtdmd_jax.training.idle import warnings
from rtdmd_jax.training.validate import check_stage, violations
from rtdmd_jax.weights.hub import find


def check(config: Any, workdir: Path | None = None, *, allow_config_change: bool = False) -> Report:
  """Builds a run of `config` abstractly and lists all problems, not the first alone.

  Nothing is written or fetched. Of checkpoints only config files and the headers of weights are
  read, adapters of earlier stages as a whole; programs are traced, not compiled. Rewards on the
  host and reward services score a grey image; rewards that are PyTorch models on this machine are
  judged by their options and files.

  Args:
    config: of any stage.
    workdir: of the run, if it is known already.
    allow_config_change: as in `train.train`.
  """
  report = Report()
  report.attempt(check_stage, config)
  if report.problems:
    return report
  if workdir is not None:
    report.lines += report.attempt(check_workdir, config, workdir, allow_config_change) or []
  if config.stage == "pretrain":
    report.lines.append("would run: pretrain, every phase without output")
    return report
  found = report.attempt(hardware.devices)
  if found is None:  # all that follows computes on a device, if only with shapes
    return report
  report.lines += found
  wrong = violations(config)
  for sentence in wrong:
    report.problem(sentence)
  if not _wrong_in(wrong, "the configuration has no"):
    _run(report, config, wrong)
  return report


def _run(report: Report, config: Any, wrong: list[str]) -> None:
  """Checks a run of stage 1 or 2; what reads a setting that is wrong is left out."""
  if config.log.wandb:
    report.attempt(import_wandb)
  if not wrong:
    for sentence in warnings(config):
      report.warning(sentence)
  prompts = None
  if not _wrong_in(wrong, "rewards", "eval.rewards"):
    report.lines += _described(config)
    prompts = read_prompts(report, config)
    if not _wrong_in(wrong, "batch."):
      report.attempt(_enough, config, prompts.train)
    if not _wrong_in(wrong, "model."):
      check_rewards(report, config, prompts)
  if not _wrong_in(wrong, "model."):
    networks = check_networks(report, config)
    if prompts is not None and networks.transformer is not None:
      report.lines += report.attempt(_cut, config, prompts) or []
    if networks.transformer is not None and not wrong:
      check_programs(report, config, networks.unreadable)
  if not wrong:
    report.lines += _plan(config)


def _wrong_in(wrong: Sequence[str], *starts: str) -> bool:
  """Whether one of the sentences is about a key that starts so."""
  return any(sentence.startswith(starts) for sentence in wrong)


def _enough(config: Any, prompts: Sequence[Prompt]) -> None:
  if prompts and len(prompts) < config.batch.prompts:
    raise UserError(
      f"batch.prompts is {config.batch.prompts}, but {config.data.prompts} has {len(prompts)}"
      " prompts; lower it."
    )


def _cut(config: Any, prompts: Prompts) -> list[str]:
  """Which prompts are too long for a text encoder, if the tokenizers are here."""
  directory = find(config.model.pretrained)
  if directory is None:
    return []
  sets = {"training prompts": prompts.train}
  for key, held_out in prompts.held_out.items():
    same = any(held_out is other for other in sets.values())
    sets |= {} if same else {f"held-out prompts of {key}": held_out}
  limits = text_limits(directory)
  return [
    line
    for what, own in sets.items()
    if own
    for line in cut_prompts(limits, [prompt.text for prompt in own], what)
  ]


def _described(config: Any) -> list[str]:
  """Lines that say what is trained, and on which rewards."""
  model = config.model
  lines = [
    f"{config.stage}: {model.pretrained} at {model.image_size} pixels, {model.dtype}, adapters of"
    f" rank {config.lora.rank}"
  ]
  lines += [f"  {role}: {model[f'{role}_init']}" for role in ROLES if model[f"{role}_init"]]
  lines += [f"  on top of {config.load[r]}" for r in ("generator", "fake_score") if config.load[r]]
  trained = [_reward(name, reward) for name, reward in config.rewards.items()]
  lines.append(f"rewards: {', '.join(trained) or 'none'}")
  if config.eval.rewards:
    lines.append(f"  evaluated only: {', '.join(config.eval.rewards)}")
  return lines


def _reward(name: str, reward: Any) -> str:
  notes = [str(reward[key]) for key in ("url", "openai_url") if key in reward]
  notes += ["back-propagated"] * bool(reward.get("backpropagate", False))
  return f"{name} x {reward.weight:g}" + (f" ({', '.join(notes)})" if notes else "")


def _plan(config: Any) -> list[str]:
  """Lines that say what the run would do, step by step."""
  t, images = config.train, config.batch.prompts * config.batch.images_per_prompt
  parts, at_once = config.batch.micro_batches, config.batch.get("decode_chunk", 0)
  split = f"{parts} micro-batches" if parts > 1 else "one piece"
  lines = [f"would run: {config.stage}, {t.steps:,} steps of {images:,} images in {split}"]
  if at_once:
    lines.append(f"  a device decodes {at_once} at once")
  if jax.default_backend() == "gpu":
    part = f"{gpu_memory.fraction():.0%} of a card's memory"
    lines.append(f"  programs may have {part}; configs/gpus.py has settings for GPUs")
  if config.stage == "stage1":
    lines.append(f"  each: a fake-score update; every {t.fake_update_ratio}th: a generator update")
  else:
    count = "fake-score update" + (f" x {t.fake_update_ratio}" if t.fake_update_ratio > 1 else "")
    lines.append(f"  each: rollout, {count}, policy update")
  lines.append(
    f"  checkpoint every {t.save_every:,}, scores of held-out prompts every {config.eval.every:,}"
  )
  count = f"{config.eval.final_prompts:,} held-out prompts x {config.eval.final_images:,}"
  return [*lines, f"  at the end: {count}, export, report"]
