"""Writes the report of a run, one self-contained HTML file, into its folder.

  python -m rtdmd_jax.report WORKDIR

Reads what the run left there: metrics.jsonl, evaluation.json (or the summary.json of
rtdmd_jax.evaluate), config.json, versions.json, the
images under evaluation/ and previews/. Writes report.html beside them.
"""

import datetime
import importlib.resources
import json
import math
import re
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from rtdmd_jax import cli
from rtdmd_jax.config import flatten
from rtdmd_jax.errors import UserError
from rtdmd_jax.report.charts import line_chart, smooth
from rtdmd_jax.report.images import compare, previews
from rtdmd_jax.report.scores import (
  Evaluation,
  count_text,
  failures,
  overlap_sentences,
  read_evaluation,
  score_table,
  tag_tables,
  tiles,
)
from rtdmd_jax.runtime.metrics import FILE_NAME, read_metrics

# A metric belongs to the first group that its name matches; _TITLES is the order of the groups.
_PATTERNS = (
  ("Held-out scores during training", r"^(eval|images)/"),
  ("Rewards", r"(^|/)rewards?(/|_|$)"),
  ("Policy ratio, clipping and advantages", r"ratio|clip|(^|[/_])kl|advantage|log_prob"),
  ("Losses", r"loss|fake_score|consistency|dmd"),
)
_OTHER = "Optimization and speed"
_TITLES = ("Losses", "Rewards", _PATTERNS[0][0], _PATTERNS[2][0], _OTHER)
_NOTES = {
  "Losses": "Faint: every logged step. Bold: exponential average over a twentieth of the run.",
  "Rewards": "Mean reward of the images sampled for training; higher is better.",
  _PATTERNS[2][0]: "How far the policy moved from the one that sampled the images.",
}

Curves = dict[str, tuple[list[int], list[float]]]


def write_report(workdir: Path) -> Path:
  """Write `workdir/report.html` from what the run left in `workdir`.

  Sections whose inputs are missing are left out.

  Returns:
    The path of the report.

  Raises:
    UserError: no such folder, neither metrics nor an evaluation in it, or a broken file.
  """
  if not workdir.is_dir():
    is_file = "is a file" if workdir.exists() else "does not exist"
    raise UserError(f"folder {workdir} {is_file}; give the --workdir of a run")
  lines = read_metrics(workdir / FILE_NAME) if (workdir / FILE_NAME).exists() else []
  paths = [workdir / name for name in ("evaluation.json", "summary.json")]
  evaluation = next((read_evaluation(path) for path in paths if path.exists()), None)
  if not lines and evaluation is None:
    raise UserError(f"{workdir} holds neither {FILE_NAME} nor evaluation.json: nothing to report")
  config = _read_object(workdir / "config.json")
  sections = [
    ("scores", "Held-out scores", _scores(evaluation)),
    ("images", "Same prompts, same noise", _images(workdir, evaluation)),
    ("warnings", "Warnings", _warnings(lines)),
    ("training", "Training curves", _training(curves(lines))),
    ("previews", "Previews over training", previews(workdir / "previews")),
    ("config", "Configuration", _settings(config)),
    ("versions", "Versions", _settings(_read_object(workdir / "versions.json"))),
  ]
  sections = [section for section in sections if section[2]]
  html = _page(workdir.resolve().name, _header(workdir, lines, config, evaluation), sections)
  report = workdir / "report.html"
  try:
    report.write_text(html, encoding="utf-8")
  except OSError as error:
    raise UserError(f"report {report} cannot be written: {error}") from error
  return report


def curves(lines: list[dict[str, Any]]) -> Curves:
  """Metric names to their steps and values; values that were not finite are NaN."""
  by_name: Curves = {}
  for line in lines:
    for name, value in line.get("scalars", {}).items():
      steps, values = by_name.setdefault(name, ([], []))
      steps.append(line["step"])
      values.append(math.nan if value is None else value)
  return by_name


def group(name: str) -> str:
  """Title of the group of charts in which the metric `name` appears."""
  return next((title for title, pattern in _PATTERNS if re.search(pattern, name)), _OTHER)


def main(call: cli.Invocation) -> None:
  """Command line: the folder as the only argument, or as `--workdir`."""
  folders = [*call.args, *([call.workdir] if call.workdir else [])]
  if len(folders) != 1:
    raise UserError("give one folder: python -m rtdmd_jax.report WORKDIR")
  print(write_report(Path(folders[0])))


def _read_object(path: Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} is not readable JSON: {error}") from error
  if not isinstance(value, dict):
    raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}")
  return value


def _header(
  workdir: Path,
  lines: list[dict[str, Any]],
  config: dict[str, Any],
  evaluation: Evaluation | None,
) -> str:
  facts = {key: value for key, value in config.items() if not isinstance(value, dict | list)}
  if lines:
    facts["training steps"] = f"{lines[-1]['step']:,}"
    facts["recorded"] = " to ".join(_day(line["time"]) for line in (lines[0], lines[-1]))
  shown = "".join(f"<span>{escape(k)} <b>{escape(str(v))}</b></span>" for k, v in facts.items())
  parts = [f"<h1>{escape(workdir.resolve().name)}</h1>"]
  if evaluation is not None:
    parts.append(f"<p>{_sentence(evaluation)}</p>")
  parts.append(f'<div class="facts">{shown}</div>')
  if evaluation is not None and evaluation.rewards:
    parts.append(tiles(evaluation))
  return "".join(parts)


def _sentence(evaluation: Evaluation) -> str:
  *others, result = evaluation.systems
  of_step = "" if evaluation.step is None else f" (step {evaluation.step:,})"
  text = f"<b>{escape(result.name)}</b>{of_step} samples in {escape(result.sampling)}"
  if others:
    names = ", ".join(f"{escape(other.name)} ({escape(other.sampling)})" for other in others)
    text += f" and is compared with {names}"
  if not evaluation.rewards:
    return f"{text}; no reward scored them."
  gains = "; in brackets, what it gains, prompt by prompt" if evaluation.differences else ""
  compared = escape(overlap_sentences(evaluation.overlap))
  return (
    f"{text}, on {count_text(evaluation)} prompts. {compared} Large numbers:"
    f" {escape(result.name)}{gains}."
  )


def _day(seconds: float) -> str:
  return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _scores(evaluation: Evaluation | None) -> str:
  if evaluation is None or not evaluation.rewards:
    return ""
  return (
    '<p class="note">Means with 95 % intervals; bold is the highest mean.</p>'
    f"{score_table(evaluation)}{failures(evaluation)}{tag_tables(evaluation)}"
  )


def _images(workdir: Path, evaluation: Evaluation | None) -> str:
  if evaluation is None:
    return ""
  systems = evaluation.systems
  return compare(
    workdir / "evaluation",
    [system.name for system in systems],
    [system.colour for system in systems],
    evaluation.prompts,
  )


def _warnings(lines: list[dict[str, Any]]) -> str:
  rows = "".join(f"<li>{escape(line['warning'])}</li>" for line in lines if "warning" in line)
  return f"<ul>{rows}</ul>" if rows else ""


def _training(found: Curves) -> str:
  parts = []
  # Single points, which the table of scores has.
  found = {name: curve for name, curve in found.items() if not name.startswith("final/")}
  for title in _TITLES:
    own = {name: curve for name, curve in found.items() if group(name) == title}
    # Counts of failed scores are worth a chart where something failed.
    own = {n: c for n, c in own.items() if not n.endswith("_failed") or any(c[1])}
    figures = [_curve(name, *curve) for name, curve in own.items()]
    if figures:
      note = f'<p class="note">{_NOTES[title]}</p>' if title in _NOTES else ""
      parts.append(f'<h3>{title}</h3>{note}<div class="charts">{"".join(figures)}</div>')
  return "".join(parts)


def _curve(name: str, steps: list[int], values: list[float]) -> str:
  array = np.asarray(values, np.float64)
  finite = array[np.isfinite(array)]
  words = []
  if len(finite):
    words.append(
      f"smoothed end {smooth(finite)[-1]:.4g}, range {finite.min():.4g} to {finite.max():.4g}"
    )
  if len(finite) < len(array):
    words.append(f'<span class="bad">{len(array) - len(finite):,} not finite</span>')
  return (
    f'<figure><div class="title">{escape(name)}</div>{line_chart(steps, values, name)}'
    f"<figcaption>{', '.join(words)}</figcaption></figure>"
  )


def _settings(values: dict[str, Any]) -> str:
  """Nested settings as one small table for each section."""
  tables: dict[str, list[tuple[str, Any]]] = {}
  for key, value in flatten(values):
    section, _, name = key.rpartition(".")
    tables.setdefault(section, []).append((name, value))
  parts = []
  for section, rows in tables.items():
    body = "".join(
      f"<tr><td>{escape(name)}</td><td>{escape(_show(value))}</td></tr>" for name, value in rows
    )
    head = f"<h3>{escape(section)}</h3>" if section else ""
    parts.append(f'<section>{head}<table class="settings">{body}</table></section>')
  return f'<div class="two">{"".join(parts)}</div>' if parts else ""


def _show(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value)


def _page(title: str, header: str, sections: list[tuple[str, str, str]]) -> str:
  style = (importlib.resources.files("rtdmd_jax") / "assets" / "report.css").read_text("utf-8")
  links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in sections)
  body = "".join(
    f'<section id="{anchor}"><h2>{name}</h2>{html}</section>' for anchor, name, html in sections
  )
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>{escape(title)}</title><style>\n{style}</style></head>\n"
    f"<body><header>{header}<nav>{links}</nav></header>\n{body}\n</body></html>\n"
  )
