"""Draws and scores several systems on the same prompts and seeds, and compares them.

python -m rtdmd_jax.evaluate --config=configs/tiny_eval.py --workdir=DIR

Reads the pipeline, adapters, prompt sets and rewards that the configuration names, and images drawn
before (--images). Writes into the workdir images/<system>/<prompt set>/<prompt>_<seed>.png,
scores.jsonl (one line an image), summary.json and report.html. Started again it draws what is
missing. A reward that cannot be built is left out with a warning.
"""

import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from rtdmd_jax import cli, evaluation, sample, sharding
from rtdmd_jax.errors import UserError
from rtdmd_jax.models.text import cut_prompts
from rtdmd_jax.pipeline import Pipeline
from rtdmd_jax.prompts import Prompt, load_prompts
from rtdmd_jax.report import write_report
from rtdmd_jax.rewards.geneval import TAGS
from rtdmd_jax.rewards.multi import MEAN, MultiReward, make
from rtdmd_jax.weights.adapters import load_adapters

_SHARED = ("pipeline", "dtype", "height", "width", "seed", "batch")
_OWN = ("few_step", "steps", "guidance", "eta", "loras")
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
  """How the system `name` of the config samples."""
  values = {key: config[key] for key in _SHARED} | dict(config.systems[name]) | {"out": ""}
  return sample.Settings.from_config(values)


def prompt_sets(config: Any) -> dict[str, list[Prompt]]:
  """The prompts of every set that a reward uses, at most `config.limit` of each (0: all)."""
  used = dict.fromkeys(reward.prompts for reward in config.rewards.values())
  loaded = {name: load_prompts(config.prompts[name], split="test", metadata=True) for name in used}
  return {name: prompts[: config.limit or None] for name, prompts in loaded.items()}


def rewards_by_set(config: Any) -> dict[str, MultiReward]:
  """The scorers of each prompt set; rewards that cannot be built are left out with a warning."""
  found: dict[str, dict[str, dict]] = {}
  for name, reward in config.rewards.items():
    options = {key: value for key, value in reward.items() if key != "prompts"}
    found.setdefault(reward.prompts, {})[name] = options
  made = {}
  for name, rewards in found.items():
    try:
      made[name] = make(dict.fromkeys(rewards, 1.0), options=rewards, allow_unavailable=True)
    except UserError as error:
      if "no reward is left" not in str(error):
        raise
      print(f"prompt set {name} is left out: {error}")
  if not made:
    raise UserError("none of the rewards can be built; see the warnings above.")
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
  found = []
  for index, prompt in enumerate(prompts):
    files = sorted(folder.glob(f"{index:05d}_*.png"))
    if not files:
      raise UserError(f"{folder} has no image of prompt {index}, {prompt.text!r}.")
    for file in files:
      notes = sample.read_notes(file)
      if notes is None or notes["prompt"] != prompt.text:
        raise UserError(f"{file} is not an image of prompt {index}, {prompt.text!r}.")
      found.append((index, notes["seed"], file))
  return found


def score(
  scorer: MultiReward, files: Sequence[Path], prompts: Sequence[Prompt], chunk: int
) -> dict[str, np.ndarray]:
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
    parts.append(scorer(images, texts, records))
  scores = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  single = tuple(f"{tag}_" for tag in TAGS)
  return {n: v for n, v in scores.items() if n != MEAN and not n.startswith(single)}


def main(call: cli.Invocation) -> None:
  """Draws, scores and compares what the command line asks for."""
  config, workdir = call.config, call.workdir
  check_config(config)
  sets = prompt_sets(config)
  ready = [given(text, sets) for text in call.flags.images]
  # Many steps first, as the report's order goes from the teacher to the result.
  own = sorted(config.systems, key=lambda name: (config.systems[name].get("few_step", True), name))
  names = [*own, *(system.name for system in ready)]
  if not names or len(set(names)) != len(names):
    raise UserError(f"systems are {', '.join(names) or '(none)'}; give at least one, once each.")
  for name in own:
    settings(config, name)
  scorers = rewards_by_set(config)
  sets = {name: sets[name] for name in scorers}
  with jax.set_mesh(sharding.make_mesh()):
    drawn = []
    if own:
      pipeline = Pipeline.from_pretrained(config.pipeline, dtype=jnp.dtype(config.dtype))
      for name, prompts in sets.items():
        for line in cut_prompts(
          pipeline.text.limits, [p.text for p in prompts], f"prompts of {name}"
        ):
          print(line)
      for name in own:
        overwrite = call.flags.overwrite
        drawn.append(draw(config, name, pipeline, sets, workdir / "images", overwrite=overwrite))
      del pipeline
    compare(config, [*drawn, *ready], sets, scorers, workdir)


def compare(
  config: Any,
  systems: Sequence[Drawn],
  sets: Mapping[str, Sequence[Prompt]],
  scorers: Mapping[str, MultiReward],
  workdir: Path,
) -> None:
  """Scores every image; writes scores.jsonl, summary.json, previews and the report; prints it."""
  workdir.mkdir(parents=True, exist_ok=True)
  rows, lines, first = [], [], next(iter(sets))
  for system in systems:
    scores, per_tag = {}, {}
    for name, prompts in sets.items():
      found = images_of(system.folders[name], prompts)
      own = [prompts[index] for index, *_ in found]
      values = score(scorers[name], [file for *_, file in found], own, config.batch)
      lines += _lines(system.name, name, found, own, values)
      part = evaluation.row(system, values, own)
      scores |= part["scores"]
      for tag, by_reward in part["per_tag"].items():
        per_tag.setdefault(tag, {}).update(by_reward)
      if name == first:
        _preview(found, workdir / "evaluation" / system.name, config.preview)
    rows.append(
      {"name": system.name, "steps": system.steps, "guidance": system.guidance}
      | {"scores": scores, "per_tag": per_tag}
    )
  (workdir / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  shown = [prompt.text for prompt in sets[first][: config.preview]]
  table = {"systems": rows, "prompts": shown}
  (workdir / "summary.json").write_text(json.dumps(table, indent=2))
  for row in rows:
    texts = (f"{name} {evaluation.score_text(s)}" for name, s in row["scores"].items())
    print(f"{row['name']:16s} {'  '.join(texts)}")
  print(f"report: {write_report(workdir)}")


def _lines(system, set_name, found, prompts, values) -> list[dict[str, Any]]:
  return [
    {
      "system": system,
      "prompts": set_name,
      "prompt_index": index,
      "seed": seed,
      "prompt": prompts[i].text,
      "scores": {n: float(v[i]) if math.isfinite(v[i]) else None for n, v in values.items()},
    }
    for i, (index, seed, _) in enumerate(found)
  ]


def _preview(found: Sequence[tuple[int, int, Path]], directory: Path, count: int) -> None:
  """Copies the first image of the first prompts to where the report looks for them."""
  directory.mkdir(parents=True, exist_ok=True)
  for index, _, file in reversed(found):
    if index < count:
      shutil.copyfile(file, directory / f"{index}.png")


def define_flags(values: flags.FlagValues) -> None:
  """The tool's own flags."""
  text = "NAME=DIR, images that rtdmd_jax.sample or this tool drew; may be repeated."
  flags.DEFINE_multi_string("images", [], text, flag_values=values)
  flags.DEFINE_bool("overwrite", False, "Replace images of other settings.", flag_values=values)


if __name__ == "__main__":
  sys.exit(cli.run(main, define_flags=define_flags, requires=("config", "workdir")))
