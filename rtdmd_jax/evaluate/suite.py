"""Draws and scores several systems on the same prompts and seeds, and compares them.

python -m rtdmd_jax.evaluate --config=configs/tiny_eval.py --workdir=DIR

Reads the pipelines, adapters, prompt sets and rewards that the configuration names, and images
drawn before (--images). Writes into the workdir images/<system>/<prompt set>/<prompt>_<seed>.png,
scores.jsonl (one line an image), summary.json and report.html. Started again it draws what is
missing. A reward that cannot be built is left out with a warning; its scores are missing, and so
are those that a reward fails on. With --checkpoint a training run's generator joins as the system
checkpoint_<step>.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from rtdmd_jax import cli, sample
from rtdmd_jax.adapters.load import load_adapters
from rtdmd_jax.datasets.geneval_records import TAGS
from rtdmd_jax.datasets.prompts import Prompt, load_prompts
from rtdmd_jax.errors import UserError
from rtdmd_jax.evaluate.scores import PromptScores, failure_texts, table_row
from rtdmd_jax.pipeline import Pipeline
from rtdmd_jax.pipeline.text import cut_prompts
from rtdmd_jax.report.page import write_report
from rtdmd_jax.report.scores import score_text
from rtdmd_jax.rewards.isolated import Scores, joined, left_out
from rtdmd_jax.rewards.multi import MultiReward, make_for_evaluation
from rtdmd_jax.runtime import sharding
from rtdmd_jax.training.stored_run import FLAG_HELP, StoredRun
from rtdmd_jax.weights.hub import local_path
from rtdmd_jax.weights.safetensors import read_config

_SHARED = ("pipeline", "dtype", "height", "width", "seed", "batch")
_OWN = ("pipeline", "few_step", "steps", "guidance", "eta", "loras")
_SCORED = 64  # images read and scored at once, at least
_KEYS = (*_SHARED, "systems", "prompts", "rewards", "limit", "preview")


@dataclass(frozen=True)
class Drawn:
  """A system whose images are there: its name, how it sampled, and a folder a prompt set."""

  name: str
  steps: int
  guidance: float
  folders: Mapping[str, Path]


def check_config(config: Any) -> None:
  """Raises UserError for a missing or unknown key, or a reward without one of the prompt sets."""
  for key in set(config) - {*_KEYS, "stage"}:
    raise UserError(f"the config has a key {key!r}, which is unknown to rtdmd_jax.evaluate.")
  for key in _KEYS:
    if key not in config:
      raise UserError(f"the config lacks the key {key!r}, which rtdmd_jax.evaluate reads.")
  for name, system in config.systems.items():
    for key in set(system) - set(_OWN):
      raise UserError(f"systems.{name} has an unknown key {key!r}; known: {', '.join(_OWN)}.")
  for name, reward in config.rewards.items():
    if reward.get("prompts") not in config.prompts:
      raise UserError(
        f"rewards.{name}.prompts is {reward.get('prompts')!r}; name one of the prompt sets"
        f" {', '.join(config.prompts) or '(none)'}."
      )


def settings(config: Any, name: str) -> sample.Settings:
  """The sampling settings of the system `name`, from its own `pipeline` or else the config's."""
  values = {key: config[key] for key in _SHARED} | dict(config.systems[name]) | {"out": ""}
  return sample.Settings.from_config(values)


def by_pipeline(config: Any, names: Sequence[str]) -> dict[str, list[str]]:
  """The systems of each pipeline directory, in order.

  Raises:
    UserError: a system's settings, or a directory without model_index.json.
  """
  systems_by_pipeline: dict[str, list[str]] = {}
  for name in names:
    systems_by_pipeline.setdefault(settings(config, name).pipeline, []).append(name)
  for directory in systems_by_pipeline:
    read_config(local_path(directory), "model_index.json")
  return systems_by_pipeline


def prompt_sets(config: Any) -> dict[str, list[Prompt]]:
  """The prompts of every set that a reward uses, at most `config.limit` of each (0: all)."""
  used = dict.fromkeys(reward.prompts for reward in config.rewards.values())
  loaded = {name: load_prompts(config.prompts[name], split="test", metadata=True) for name in used}
  return {name: prompts[: config.limit or None] for name, prompts in loaded.items()}


def rewards_by_set(config: Any) -> dict[str, MultiReward]:
  """The scorers of each prompt set; rewards that cannot be built are left out with a warning."""
  options_by_set: dict[str, dict[str, dict]] = {}
  for name, reward in config.rewards.items():
    options = {key: value for key, value in reward.items() if key != "prompts"}
    options_by_set.setdefault(reward.prompts, {})[name] = options
  made = {name: make_for_evaluation(rewards) for name, rewards in options_by_set.items()}
  if not any(scorer.rewards for scorer in made.values()):
    raise UserError("none of the rewards can be built; see the warnings above.")
  for name, scorer in made.items():
    if not scorer.rewards:
      print(f"prompt set {name} is not drawn: none of its rewards can be built")
  return made


def draw(
  config: Any,
  name: str,
  pipeline: Pipeline,
  sets: Mapping[str, Sequence[Prompt]],
  directory: Path,
  *,
  overwrite: bool,
) -> Drawn:
  """Draws what is missing of a system's images, one a prompt, on the current mesh."""
  how = settings(config, name)
  adapters = load_adapters(how.loras, pipeline.transformer)
  return _draw(name, how, pipeline, adapters, sets, directory, overwrite=overwrite)


def draw_checkpoint(
  config: Any,
  run: StoredRun,
  sets: Mapping[str, Sequence[Prompt]],
  directory: Path,
  *,
  overwrite: bool,
) -> Drawn:
  """As `draw` with the pipeline, adapters and few steps of a training run's checkpoint."""
  how = checkpoint_settings(config, run)
  pipeline = run.pipeline(jnp.dtype(how.dtype))
  adapters, words = run.adapters(pipeline.transformer)
  print(f"{run.directory}: {words}")
  name = checkpoint_name(run)
  return _draw(name, how, pipeline, adapters, sets, directory, overwrite=overwrite)


def checkpoint_name(run: StoredRun) -> str:
  """The system that a checkpoint is evaluated as."""
  return f"checkpoint_{run.step}"


def checkpoint_settings(config: Any, run: StoredRun) -> sample.Settings:
  """The sampling settings of a training run's generator, in the sizes of the config.

  Raises:
    UserError: its few steps are not those that `rtdmd_jax.sample` draws with.
  """
  levels, steps = list(run.config["dmd"]["timesteps"]), len(run.config["dmd"]["timesteps"])
  if not np.allclose(levels, 1000.0 * (1.0 - np.arange(steps) / steps)):
    raise UserError(
      f"{run.directory} was trained with dmd.timesteps={levels}; only evenly spaced steps from 1000"
      " on can be drawn with."
    )
  few = {"few_step": True, "steps": steps, "guidance": 1.0, "eta": run.config["dmd"]["eta"]}
  values = {key: config[key] for key in _SHARED} | few | {"loras": (), "out": ""}
  return sample.of_run(sample.Settings.from_config(values), run)


def _draw(
  name: str,
  how: sample.Settings,
  pipeline: Pipeline,
  adapters: Any,
  sets: Mapping[str, Sequence[Prompt]],
  directory: Path,
  *,
  overwrite: bool,
) -> Drawn:
  folders = {}
  for set_name, prompts in sets.items():
    folder = folders[set_name] = directory / name / set_name
    shots = [sample.Shot(i, prompt.text, how.seed) for i, prompt in enumerate(prompts)]
    todo = sample.pending(shots, how, folder, overwrite=overwrite)
    if todo:
      for shot, image in sample.draw(pipeline, how, adapters, todo):
        sample.write(image, shot.path(folder), shot.notes(how))
    print(f"{folder}: {len(todo)} images drawn, {len(shots) - len(todo)} were there")
  return Drawn(name, how.steps, how.guidance, folders)


def given(text: str, sets: Mapping[str, Sequence[Prompt]]) -> Drawn:
  """The system of `--images NAME=DIR`: DIR has a folder for each prompt set, or is the only one.

  Raises:
    UserError: no such folder, or it holds no images of rtdmd_jax.sample.
  """
  name, _, path = text.partition("=")
  if not name or not path:
    raise UserError(f"--images={text} must be NAME=DIR.")
  folders = {key: Path(path) / key for key in sets}
  if len(sets) == 1 and not next(iter(folders.values())).is_dir():
    folders = dict.fromkeys(sets, Path(path))
  for folder in folders.values():
    notes = next((n for n in map(sample.read_notes, sorted(folder.glob("*_*.png"))) if n), None)
    if notes is None:
      raise UserError(f"--images={text}: {folder} holds no images of rtdmd_jax.sample.")
  return Drawn(name, notes["steps"], notes["guidance"], folders)


def images_of(folder: Path, prompts: Sequence[Prompt]) -> list[tuple[int, int, Path]]:
  """(prompt number, seed, file) of every image of the prompts in a folder, in order.

  Raises:
    UserError: a prompt without an image, or an image of another prompt.
  """
  drawn = []
  for index, prompt in enumerate(prompts):
    files = sorted(folder.glob(f"{index:05d}_*.png"))
    if not files:
      raise UserError(f"{folder} has no image of prompt {index}, {prompt.text!r}.")
    for file in files:
      notes = sample.read_notes(file)
      if notes is None or notes["prompt"] != prompt.text:
        raise UserError(f"{file} is not an image of prompt {index}, {prompt.text!r}.")
      drawn.append((index, notes["seed"], file))
  return drawn


def score(
  scorer: MultiReward, files: Sequence[Path], prompts: Sequence[Prompt], chunk: int
) -> Scores:
  """Every output of the rewards [N]; NaN where a sample failed.

  GenEval's outputs for single tags are left out: the summary has all scores by tag.

  Raises:
    UserError: images of two sizes.
  """
  parts, first = [], None
  for start in range(0, len(files), chunk):
    rows = slice(start, start + chunk)
    read = [Image.open(file).convert("RGB") for file in files[rows]]
    first = first or read[0].size
    for file, image in zip(files[rows], read, strict=True):
      if image.size != first:
        (w, h), (width, height) = first, image.size
        raise UserError(
          f"{files[0]} is {w} x {h} pixels and {file} is {width} x {height}; the images of a folder"
          " must be of one size."
        )
    images = np.stack([np.asarray(image) for image in read])
    texts, records = [p.text for p in prompts[rows]], [p.record for p in prompts[rows]]
    parts.append(scorer.isolated(images, texts, records))
  scores = joined(parts)
  single = tuple(f"{tag}_" for tag in TAGS)
  values = {n: v for n, v in scores.values.items() if not n.startswith(single)}
  return scores._replace(values=values)


def main(call: cli.Invocation) -> None:
  """Draws, scores and compares what the command line asks for."""
  call.expect("evaluation")
  config, workdir = call.config, call.workdir
  check_config(config)
  sets = prompt_sets(config)
  ready = [given(text, sets) for text in call.flags.images]
  # Many steps first, as the report's order goes from the teacher to the result.
  own = sorted(config.systems, key=lambda name: (config.systems[name].get("few_step", True), name))
  run = StoredRun.parse(call.flags.checkpoint) if call.flags.checkpoint else None
  names = [*own, *(system.name for system in ready), *([checkpoint_name(run)] if run else [])]
  if not names or len(set(names)) != len(names):
    raise UserError(f"systems are {', '.join(names) or '(none)'}; give at least one, once each.")
  pipelines = by_pipeline(config, own)
  if run:
    checkpoint_settings(config, run)
  cli.make_folder(workdir, "--workdir")
  scorers = rewards_by_set(config)
  wanted = {name: sets[name] for name, scorer in scorers.items() if scorer.rewards}
  with jax.set_mesh(sharding.make_mesh()):
    drawn = {}
    for directory, names in pipelines.items():
      pipeline = Pipeline.from_pretrained(directory, dtype=jnp.dtype(config.dtype))
      if not drawn:
        _print_cut(pipeline, wanted)
      for name in names:
        overwrite = call.flags.overwrite
        drawn[name] = draw(config, name, pipeline, wanted, workdir / "images", overwrite=overwrite)
      del pipeline  # the next one takes its place in memory
    if run:
      overwrite = call.flags.overwrite
      ready.append(draw_checkpoint(config, run, wanted, workdir / "images", overwrite=overwrite))
    compare(config, [*(drawn[name] for name in own), *ready], sets, scorers, workdir)


def _print_cut(pipeline: Pipeline, sets: Mapping[str, Sequence[Prompt]]) -> None:
  """Says which prompts are too long for a text encoder."""
  for name, prompts in sets.items():
    texts = [prompt.text for prompt in prompts]
    for line in cut_prompts(pipeline.text.limits, texts, f"prompts of {name}"):
      print(line)


def compare(
  config: Any,
  systems: Sequence[Drawn],
  sets: Mapping[str, Sequence[Prompt]],
  scorers: Mapping[str, MultiReward],
  workdir: Path,
) -> None:
  """Scores every image; writes scores.jsonl, summary.json, previews and the report; prints it."""
  workdir.mkdir(parents=True, exist_ok=True)
  rows, lines = [], []
  first = next(name for name in sets if scorers[name].rewards)
  for system in systems:
    judged = []
    for name, prompts in sets.items():
      if not scorers[name].rewards:  # nothing was drawn
        lost = left_out(len(prompts), scorers[name].unavailable)
        judged.append(PromptScores.of(lost, prompts))
        continue
      images = images_of(system.folders[name], prompts)
      own = [prompts[index] for index, *_ in images]
      scores = score(scorers[name], [file for *_, file in images], own, max(config.batch, _SCORED))
      lines += _lines(system.name, name, images, own, scores.values)
      judged.append(PromptScores.of(scores, own))
      if name == first:
        _preview(images, workdir / "evaluation" / system.name, config.preview)
    rows.append(table_row(system, judged))
  (workdir / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  shown = [prompt.text for prompt in sets[first][: config.preview]]
  table = {"systems": rows, "prompts": shown}
  (workdir / "summary.json").write_text(json.dumps(table, indent=2))
  for row in rows:
    texts = (f"{name} {score_text(s)}" for name, s in row["scores"].items())
    print(f"{row['name']:16s} {'  '.join(texts)}")
  for text in failure_texts(rows):
    print(f"warning: {text}")
  print(f"report: {write_report(workdir)}")


def _lines(system, set_name, images, prompts, values) -> list[dict[str, Any]]:
  return [
    {
      "system": system,
      "prompts": set_name,
      "prompt_index": index,
      "seed": seed,
      "prompt": prompts[i].text,
      "scores": {n: float(v[i]) if math.isfinite(v[i]) else None for n, v in values.items()},
    }
    for i, (index, seed, _) in enumerate(images)
  ]


def _preview(images: Sequence[tuple[int, int, Path]], directory: Path, count: int) -> None:
  """Copies the first image of the first prompts to where the report looks for them."""
  directory.mkdir(parents=True, exist_ok=True)
  for index, _, file in reversed(images):
    if index < count:
      shutil.copyfile(file, directory / f"{index}.png")


def define_flags(values: flags.FlagValues) -> None:
  """The tool's own flags."""
  text = "NAME=DIR, images that rtdmd_jax.sample or this tool drew; may be repeated."
  flags.DEFINE_multi_string("images", [], text, flag_values=values)
  about = f"{FLAG_HELP} Its generator is a further system."
  flags.DEFINE_string("checkpoint", None, about, flag_values=values)
  flags.DEFINE_bool("overwrite", False, "Replace images of other settings.", flag_values=values)
