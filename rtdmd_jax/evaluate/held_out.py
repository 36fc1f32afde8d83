"""Looks at a run's generator on held-out prompts: previews, scores, signs of reward hacking."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from rtdmd_jax.datasets.prompts import Prompt
from rtdmd_jax.evaluate import systems
from rtdmd_jax.evaluate.evaluator import Evaluator
from rtdmd_jax.evaluate.monitors import DIVERSE_IMAGES, DIVERSE_PROMPTS, Monitor, image_values
from rtdmd_jax.evaluate.scores import failure_texts
from rtdmd_jax.report.captions import labels, write_names
from rtdmd_jax.report.grids import save_png, side_by_side
from rtdmd_jax.report.scores import score_text
from rtdmd_jax.rewards.isolated import sentence
from rtdmd_jax.runtime import multihost
from rtdmd_jax.runtime.metrics import MetricWriter, markdown
from rtdmd_jax.training.setup import Setup
from rtdmd_jax.training.state import TrainState

# Width of an image of the preview in pixels, at most.
_PREVIEW_CELL = 256


def evaluate(
  config: Any,
  setup: Setup,
  evaluator: Evaluator,
  state: TrainState,
  step: int,
  writer: MetricWriter,
  workdir: Path,
) -> None:
  """Scores the averaged generator on a few held-out prompts of each set; writes a preview grid.

  Nothing in it ends a run, but an error of the device one of several processes: what failed is NaN,
  counted in `eval/<reward>_failed`, and named in a warning.
  """
  system = systems.generator(setup, config, "generator", state.ema)
  values, failed, warnings, preview = {}, {}, [], None
  for number, part in enumerate(setup.held_out_sets):
    prompts, shown = _spread(part.prompts, config.eval.prompts), number == 0
    several = [p for p in prompts[:DIVERSE_PROMPTS] for _ in range(DIVERSE_IMAGES)] if shown else []
    seen = evaluator.look(system, prompts, part.rewards, several)
    if seen.problem:
      warnings.append(f"prompts of {part.path}: {seen.problem}")
    values |= {f"eval/{name}": v for name, v in seen.scores.values.items()}
    failed |= {name: seen.scores.failed(name) for name in seen.scores.values}
    for name, reason in seen.scores.reasons.items():
      count = f"{failed[name]:,} of {len(prompts):,} held-out images"
      warnings.append(f"reward {name} failed on {count}: {reason}")
    if shown and seen.images is not None:
      with _guarded("drawing the preview", warnings, joint=jax.process_count() > 1):
        picture = _preview(config, setup, evaluator, state, system, seen.images, prompts)
        preview = picture, [p.text for p in prompts[: config.eval.preview]]
      if not seen.problem:
        groups = seen.images[len(prompts) :].reshape(-1, DIVERSE_IMAGES, *seen.images.shape[1:])
        values |= image_values(seen.images[: len(prompts)], groups)
  if multihost.is_main():
    outcome = _Evaluation(values, failed, warnings, preview)
    _report(config, step, outcome, writer, workdir)


class _Evaluation(NamedTuple):
  """The outcome of an evaluation.

  Attributes:
    values: scores and statistics of every image, by metric.
    failed: number of images without a score, by reward.
    warnings: sentences about what went wrong.
    preview: a picture and its prompts; None if there is none.
  """

  values: dict[str, np.ndarray]
  failed: dict[str, int]
  warnings: list[str]
  preview: tuple[Image.Image, list[str]] | None


def _report(
  config: Any, step: int, outcome: _Evaluation, writer: MetricWriter, workdir: Path
) -> None:
  """Writes an evaluation's metrics, warnings and preview."""
  values, failed, warnings, preview = outcome
  counts = {f"eval/{name}_failed": count for name, count in failed.items()}
  writer.scalars(step, {name: _mean(v) for name, v in values.items()} | counts)
  hacking = None
  with _guarded("the comparison with the first evaluation", warnings):
    trained = [name for name, reward in config.rewards.items() if reward.weight]
    hacking = Monitor(workdir / "monitor.json", trained).look(step, values)
  if preview is not None:
    with _guarded("writing the preview", warnings):
      _write_preview(step, *preview, writer, workdir)
  for text in [*([hacking] if hacking else []), *(f"step {step}: {w}" for w in warnings)]:
    print(text)
    writer.warning(step, text)


def _write_preview(
  step: int, picture: Image.Image, prompts: list[str], writer: MetricWriter, workdir: Path
) -> None:
  """Writes the picture, and the prompts that its font cannot draw beside it."""
  file = workdir / f"previews/step_{step:06d}.png"
  file.parent.mkdir(exist_ok=True)
  save_png(file, picture)
  writer.image(step, "preview", np.asarray(picture))
  _, names = labels(prompts)
  write_names(file.with_suffix(".txt"), names)
  if names:
    writer.text(step, "preview", markdown(names))


@contextlib.contextmanager
def _guarded(what: str, warnings: list[str], *, joint: bool = False) -> Iterator[None]:
  """An error inside joins the warnings; a `joint` one ends all processes, see `Evaluator.look`."""
  try:
    yield
  except Exception as error:
    if joint:
      raise
    warnings.append(f"{what} failed: {sentence(error)}")


def _preview(
  config: Any,
  setup: Setup,
  evaluator: Evaluator,
  state: TrainState,
  system: systems.System,
  images: np.ndarray,
  prompts: list[Prompt],
) -> Image.Image:
  """The generator's images between the teacher's and what the fake score takes them for."""
  prompts = prompts[: config.eval.preview]
  teacher = systems.teacher(setup, config)
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
  evaluator: Evaluator,
  state: TrainState,
  workdir: Path,
) -> None:
  """Scores teacher, start and result side by side; writes `evaluation.json`, prints the scores."""
  count = config.eval.final_prompts
  sets = [part._replace(prompts=_spread(part.prompts, count)) for part in setup.held_out_sets]
  start = "cold start" if setup.frozen.generator else "base"
  compared = [
    systems.teacher(setup, config),
    systems.generator(setup, config, f"{start}, few steps", None),
    systems.generator(setup, config, "result, few steps", state.ema),
  ]
  rows = evaluator.compare(compared, sets, workdir, config.eval.final_images)["systems"]
  for row in rows:
    scores = "  ".join(f"{name} {score_text(s)}" for name, s in row["scores"].items())
    print(
      f"{row['name']:24s} {row['steps']:3d} steps  guidance {row['guidance']}  {scores}".rstrip()
    )
  for text in failure_texts(rows):
    print(f"warning: {text}")
