"""Held-out scores in the report: reading `evaluation.json`, headline, tables."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rtdmd_jax.errors import UserError
from rtdmd_jax.report.charts import interval_chart

Scores = dict[str, "Score"]


@dataclass(frozen=True)
class Score:
  """Mean of `n` values with the half width of its 95 % interval; None when nothing was scored.

  `failed` images have no score; `reason` is that of the first of them.
  """

  mean: float | None
  ci95: float | None
  n: int
  failed: int = 0
  reason: str = ""


@dataclass(frozen=True)
class System:
  """One evaluated model: how it sampled and what it scored, also by tag of the prompts."""

  name: str
  steps: int
  guidance: float | None
  scores: Scores
  per_tag: dict[str, Scores]
  colour: str

  @property
  def label(self) -> str:
    """Its name with a dot in its colour, as HTML."""
    return f'<span class="dot" style="background:{self.colour}"></span>{escape(self.name)}'

  @property
  def sampling(self) -> str:
    """`4 steps`, or `40 steps, guidance 4.5`."""
    steps = f"{self.steps} step{'' if self.steps == 1 else 's'}"
    return steps if self.guidance is None else f"{steps}, guidance {self.guidance:g}"


@dataclass(frozen=True)
class Evaluation:
  """All systems, from the teacher to the result, and the prompts that they were given.

  `prompts` are those whose images are shown. `differences` are the result's scores minus another
  system's, by that system's name. `step` is that of the result's weights and `overlap` what
  `overlap_sentences` takes, as far as they are known.
  """

  systems: list[System]
  prompts: list[str]
  differences: dict[str, Scores]
  step: int | None
  overlap: dict[str, Sequence[int]]

  @property
  def rewards(self) -> list[str]:
    """Names of the rewards in the order of their first appearance."""
    return list(dict.fromkeys(name for system in self.systems for name in system.scores))


def read_evaluation(path: Path) -> Evaluation:
  """Read `evaluation.json`.

  The file is `{"systems": [...], "prompts": [...]}`. A system is `{"name", "steps", "guidance",
  "scores", "per_tag"}` with `scores = {reward: {"mean", "ci95", "n"}}` and `per_tag = {tag:
  scores}`; `ci95` is half the width of the 95 % interval, and `failed` and `reason` may be there,
  of images without a score. The systems go from the teacher to the result, which is the last.
  `"differences": {system name: scores}` may be there, and so may `"run": {"step": number,
  "overlap": {held-out set: [shared, all]}}`.

  Raises:
    UserError: the file is broken; the system and the key are named.
  """
  try:
    data = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} is not readable JSON: {error}") from error
  entries = _get(data, "systems", list, path, "the file")
  if not entries:
    raise UserError(f"{path}: 'systems' is empty; evaluate at least one system")
  systems = [_read_system(entry, index, path) for index, entry in enumerate(entries)]
  prompts = [str(text) for text in _get(data, "prompts", list, path, "the file")]
  differences = _get({"differences": {}} | data, "differences", dict, path, "the file")
  run = {"step": None, "overlap": None} | _get({"run": {}} | data, "run", dict, path, "the file")
  overlap = _get(run, "overlap", dict | None, path, "run") or {}
  if not all(_is_share(share) for share in overlap.values()):
    raise UserError(f"{path}: run, overlap must give two whole numbers for each set of prompts")
  return Evaluation(
    systems,
    prompts,
    {name: _read_scores(s, path, f"differences, {name!r}") for name, s in differences.items()},
    _get(run, "step", int | None, path, "run"),
    overlap,
  )


def _is_share(value: Any) -> bool:
  return isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) for n in value)


def overlap_sentences(overlap: Mapping[str, Sequence[int]]) -> str:
  """Sentences about held-out prompts that are training prompts as well.

  Args:
    overlap: for each held-out set, how many prompts are trained on as well, and how many it has.
  """
  parts = []
  for key, (shared, total) in overlap.items():
    count, verb = f"{shared:,}" if shared else "None", "are" if shared > 1 else "is"
    parts.append(f"{count} of the {total:,} prompts of {key} {verb} trained on in this stage.")
  return " ".join(parts)


def count_text(evaluation: Evaluation) -> str:
  """How many prompts the result's scores are means over, `100` or `0 to 100`."""
  counts = sorted({score.n for score in evaluation.systems[-1].scores.values()}) or [0]
  return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def tiles(evaluation: Evaluation) -> str:
  """The result's scores as large numbers with those of the other systems beneath; HTML."""
  *others, result = evaluation.systems
  parts = []
  for reward, score in result.scores.items():
    digits = _digits([score, *(other.scores.get(reward) for other in others)])
    against = "<br>".join(
      f"{other.label} {_plain(other.scores.get(reward), digits)}"
      f"{_gain(evaluation.differences.get(other.name, {}).get(reward), digits)}"
      for other in others
    )
    parts.append(
      f'<div class="tile"><div class="name">{escape(reward)}</div>'
      f'<div class="value">{_with_interval(score, digits)}</div>'
      f'<div class="against">{against}</div></div>'
    )
  return f'<div class="tiles">{"".join(parts)}</div>'


def score_table(evaluation: Evaluation) -> str:
  """Rewards in rows, systems in columns, with a chart of the intervals; HTML."""
  systems = evaluation.systems
  heads = "".join(f"<th>{s.label}<small>{escape(s.sampling)}</small></th>" for s in systems)
  rows = []
  for reward in evaluation.rewards:
    scores = [system.scores.get(reward) for system in systems]
    count = max(score.n for score in scores if score)
    lost = sum(score.failed for score in scores if score)
    failed = f', <span class="bad">{lost:,} failed</span>' if lost else ""
    name = f"{escape(reward)} <small>n = {count:,}{failed}</small>"
    rows.append(_row(name, scores, systems, _limits(scores)))
  return _table("reward", heads, rows)


def failures(evaluation: Evaluation) -> str:
  """Why images have no score, a line for every reward and system; empty if all have; HTML."""
  rows = "".join(
    f"<li>{escape(reward)}, {escape(system.name)}: failed on {score.failed:,} of its images:"
    f" {escape(score.reason)}</li>"
    for system in evaluation.systems
    for reward, score in system.scores.items()
    if score.failed and score.reason
  )
  return f"<ul>{rows}</ul>" if rows else ""


def tag_tables(evaluation: Evaluation) -> str:
  """HTML tables of the prompts' tags, one for each reward; empty where there are no tags."""
  systems = evaluation.systems
  tags = list(dict.fromkeys(tag for system in systems for tag in system.per_tag))
  heads = "".join(f"<th>{system.label}</th>" for system in systems)
  parts = []
  for reward in evaluation.rewards:
    by_tag = {tag: [system.per_tag.get(tag, {}).get(reward) for system in systems] for tag in tags}
    by_tag = {tag: scores for tag, scores in by_tag.items() if any(scores)}
    if by_tag:
      limits = _limits([score for scores in by_tag.values() for score in scores])
      rows = []
      for tag, scores in by_tag.items():
        count = max(score.n for score in scores if score)
        name = f"{escape(tag)} <small>{count:,}</small>"
        rows.append(_row(name, scores, systems, limits))
      parts.append(f"<h3>{escape(reward)} by tag</h3>{_table('tag', heads, rows)}")
  return "".join(parts)


def _read_system(entry: Any, index: int, path: Path) -> System:
  where = f"system {index + 1}"
  name = _get(entry, "name", str, path, where)
  where = f"system {name!r}"
  guidance = _get(entry, "guidance", int | float | None, path, where)
  per_tag = _get(entry, "per_tag", dict, path, where)
  return System(
    name=name,
    steps=_get(entry, "steps", int, path, where),
    guidance=guidance,
    scores=_read_scores(_get(entry, "scores", dict, path, where), path, where),
    per_tag={tag: _read_scores(s, path, f"{where}, tag {tag!r}") for tag, s in per_tag.items()},
    colour=f"var(--s{index % 6})",
  )


def _read_scores(entry: Any, path: Path, where: str) -> Scores:
  if not isinstance(entry, dict):
    raise UserError(f"{path}: {where}: scores must be an object of rewards")
  number = int | float | None
  return {
    reward: Score(
      *(_get(score, key, number, path, f"{where}, reward {reward!r}") for key in ("mean", "ci95")),
      *(_get(score, key, int, path, f"{where}, reward {reward!r}") for key in ("n", "failed")),
      _get(score, "reason", str, path, f"{where}, reward {reward!r}"),
    )
    for reward, score in ((r, _lossless(s)) for r, s in entry.items())
  }


def _lossless(score: Any) -> Any:
  """A score of a file that does not count failures."""
  return {"failed": 0, "reason": ""} | score if isinstance(score, dict) else score


def _get(entry: Any, key: str, kind: Any, path: Path, where: str) -> Any:
  if not isinstance(entry, dict) or key not in entry or not isinstance(entry[key], kind):
    wanted = (
      getattr(kind, "__name__", str(kind)).replace("list", "a list").replace("dict", "object")
    )
    raise UserError(f"{path}: {where} needs {key!r} ({wanted})")
  return entry[key]


def _table(first: str, heads: str, rows: Sequence[str]) -> str:
  return (
    f'<div class="scroll"><table><thead><tr><th>{first}</th>{heads}<th class="plot"></th></tr>'
    f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
  )


def _row(
  name: str,
  scores: Sequence[Score | None],
  systems: Sequence[System],
  limits: tuple[float, float],
) -> str:
  digits = _digits(scores)
  best = max((s.mean for s in scores if s and s.mean is not None), default=None)
  cells = "".join(
    f"<td{_best(score, best)}>{_with_interval(score, digits)}</td>" for score in scores
  )
  drawn = [
    (system.colour, score.mean, score.ci95 or 0.0)
    for system, score in zip(systems, scores, strict=True)
    if score and score.mean is not None
  ]
  chart = interval_chart(drawn, limits, "means with 95 % intervals")
  return f'<tr><td>{name}</td>{cells}<td class="plot">{chart}</td></tr>'


def _best(score: Score | None, best: float | None) -> str:
  return ' class="best"' if score and best is not None and score.mean == best else ""


def _limits(scores: Sequence[Score | None]) -> tuple[float, float]:
  known = [s for s in scores if s and s.mean is not None]
  low = min((s.mean - (s.ci95 or 0) for s in known), default=0.0)
  high = max((s.mean + (s.ci95 or 0) for s in known), default=1.0)
  return low, high


def _digits(scores: Sequence[Score | None]) -> int:
  """Decimals that show two digits of the narrowest interval."""
  widths = [s.ci95 for s in scores if s and s.ci95]
  return 3 if not widths else min(max(1 - math.floor(math.log10(min(widths))), 0), 5)


def _plain(score: Score | None, digits: int) -> str:
  return "–" if score is None or score.mean is None else f"{score.mean:.{digits}f}"


def _gain(difference: Score | None, digits: int) -> str:
  if difference is None or difference.mean is None or difference.ci95 is None:
    return ""
  return f" <small>({difference.mean:+.{digits}f} ± {difference.ci95:.{digits}f})</small>"


def _with_interval(score: Score | None, digits: int) -> str:
  text = _plain(score, digits)
  if score is None or score.mean is None or score.ci95 is None:
    return text
  return f"{text} <small>± {score.ci95:.{digits}f}</small>"


def score_text(score: Mapping[str, Any]) -> str:
  """A row's mean with its 95 % interval, as far as enough samples could be scored."""
  if score["mean"] is None:
    return "failed"
  interval = "" if score["ci95"] is None else f" ± {score['ci95']:.4f}"
  failed = f" ({score['failed']} failed)" if score.get("failed") else ""
  return f"{score['mean']:.4f}{interval}{failed}"
