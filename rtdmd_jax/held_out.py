"""Looks at a run's generator on held-out prompts: previews, scores, signs of reward hacking."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rtdmd_jax import evaluation, hosts
from rtdmd_jax.build import Setup
from rtdmd_jax.captions import labels, write_names
from rtdmd_jax.grids import save_png, side_by_side
from rtdmd_jax.metrics import MetricWriter, markdown
from rtdmd_jax.monitors import DIVERSE_IMAGES, DIVERSE_PROMPTS, Monitor, image_values
from rtdmd_jax.prompts import Prompt
from rtdmd_jax.state import TrainState

# Width of an image of the preview in pixels, at most.
_PREVIEW_CELL = 256


def evaluate(
  config: Any,
  setup: Setup,
  evaluator: evaluation.Evaluator,
  state: TrainState,
  step: int,
  writer: MetricWriter,
  workdir: Path,
) -> None:
  """Scores the averaged generator on a few held-out prompts and writes a preview grid."""
  prompts = _spread(setup.held_out, config.eval.prompts)
  system = evaluation.generator(setup, config, "generator", state.ema)
  several = [p for p in prompts[:DIVERSE_PROMPTS] for _ in range(DIVERSE_IMAGES)]
  images, groups = np.split(evaluator.images(system, prompts + several), [len(prompts)])
  groups = groups.reshape(-1, DIVERSE_IMAGES, *groups.shape[1:])
  values = {f"eval/{name}": v for name, v in evaluator.scores(images, prompts).items()}
  picture = _preview(config, setup, evaluator, state, system, images, prompts)
  if not hosts.is_main():
    return
  values |= image_values(images, groups)
  writer.scalars(step, {name: _mean(v) for name, v in values.items()})
  trained = [name for name, reward in config.rewards.items() if reward.weight]
  if warning := Monitor(workdir / "monitor.json", trained).look(step, values):
    print(warning)
    writer.warning(step, warning)
  (workdir / "previews").mkdir(exist_ok=True)
  file = workdir / f"previews/step_{step:06d}.png"
  save_png(file, picture)
  writer.image(step, "preview", np.asarray(picture))
  _, names = labels([p.text for p in prompts[: config.eval.preview]])
  write_names(file.with_suffix(".txt"), names)
  if names:
    writer.text(step, "preview", markdown(names))


def _preview(
  config: Any,
  setup: Setup,
  evaluator: evaluation.Evaluator,
  state: TrainState,
  system: evaluation.System,
  images: np.ndarray,
  prompts: list[Prompt],
) -> Image.Image:
  """The generator's images between the teacher's and what the fake score takes them for."""
  prompts = prompts[: config.eval.preview]
  teacher = evaluation.teacher(setup, config)
  rows = {
    f"teacher, {teacher.steps} steps": evaluator.teacher_images(teacher, prompts),
    "generator": images[: len(prompts)],
    "fake score": evaluator.predictions(system, state.fake_score, prompts),
  }
  cell = min(max(images.shape[2], 128), _PREVIEW_CELL)
  return side_by_side(rows, [p.text for p in prompts], cell=cell)


def _mean(values: np.ndarray) -> float:
  finite = values[np.isfinite(values)]
  return float(finite.mean()) if len(finite) else float("nan")


def _spread(prompts: list[Prompt], count: int) -> list[Prompt]:
  """At most `count` prompts, evenly spread over the list and shuffled the same way every time."""
  count = min(count, len(prompts))
  chosen = [prompts[i * len(prompts) // count] for i in range(count)]
  return [chosen[i] for i in np.random.default_rng(0).permutation(count)]


def final_evaluation(
  config: Any,
  setup: Setup,
  evaluator: evaluation.Evaluator,
  state: TrainState,
  workdir: Path,
) -> None:
  """Scores teacher, start and result side by side; writes `evaluation.json`, prints the scores."""
  prompts = _spread(setup.held_out, config.eval.final_prompts)
  start = "cold start" if setup.frozen.generator else "base"
  systems = [
    evaluation.teacher(setup, config),
    evaluation.generator(setup, config, f"{start}, few steps", None),
    evaluation.generator(setup, config, "result, few steps", state.ema),
  ]
  for row in evaluator.compare(systems, prompts, workdir, config.eval.final_images)["systems"]:
    scores = "  ".join(f"{name} {evaluation.score_text(s)}" for name, s in row["scores"].items())
    print(f"{row['name']:24s} {row['steps']:3d} steps  guidance {row['guidance']}  {scores}")
