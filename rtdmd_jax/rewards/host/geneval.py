"""GenEval's scoring rule over any detector (arXiv 2310.11513; soft credits as RTDMD trains on).

A detector finds objects, this module compares them with a record. Three figures come out of a
record: a soft score with partial credits (the training reward), a strict verdict (every count,
colour and relation exact) and GenEval's official verdict.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rtdmd_jax.datasets.geneval_records import TAGS
from rtdmd_jax.datasets.relations import relations
from rtdmd_jax.errors import UserError

SCORE_THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
OTHER_TAG = -10.0


class Detection(NamedTuple):
  """One object found: class, box `(x0, y0, x1, y1)` in pixels, confidence in [0, 1], colour."""

  name: str
  box: tuple[float, float, float, float]
  score: float
  color: str | None = None


Detector = Callable[[np.ndarray], list[list[Detection]]]


class Verdict(NamedTuple):
  """Result for one image: soft score (at most 1, may be negative), strict and official verdict."""

  soft: float
  strict: bool
  official: bool


def confident(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
  """Groups detections by class, best first: above the tag's threshold, 16 a class at most."""
  threshold = COUNTING_THRESHOLD if tag == "counting" else SCORE_THRESHOLD
  groups: dict[str, list[Detection]] = {}
  for detection in sorted(detections, key=lambda d: -d.score):
    group = groups.setdefault(detection.name, [])
    if detection.score > threshold and len(group) < MAX_OBJECTS:
      group.append(detection)
  return groups


def _closeness(wanted: int, counted: int) -> float:
  return 1.0 - abs(wanted - counted) / wanted


def _of_color(detected: Sequence[Detection], color: str) -> int:
  return sum(d.color == color for d in detected)


def _all_related(
  detected: Sequence[Detection], targets: Sequence[Detection], relation: str
) -> bool:
  return all(relation in relations(a.box, b.box) for a in detected for b in targets)


def soft_and_strict(record: Mapping, objects: Mapping[str, list[Detection]]) -> tuple[float, bool]:
  """Mean of partial credits, and whether every requirement holds exactly.

  Credits of one `include` entry: `1 - |count - counted| / count`, negative when over-counted; if
  the count is wrong and a colour or relation was asked, one 0; if it is right, `1 - |count - right
  colour| / count` for a colour. A relation is judged once count and colour hold: 0 if its target
  failed, else 1, preceded by a 0 if it does not hold. That 1 also after a wrong relation is as
  published (RTDMD and Flow-GRPO): a wrong relation costs a smaller share than the formula's
  intent, and keeping it keeps rewards comparable. `exclude` plays no part here.

  Args:
    record: a GenEval record.
    objects: confident detections by class, from `confident`.
  """
  credits: list[float] = []
  matched: list[list[Detection] | None] = []
  for need in record["include"]:
    count, detected = need["count"], objects.get(need["class"], [])
    credits.append(_closeness(count, len(detected)))
    right = len(detected) == count
    if not right and ("color" in need or "position" in need):
      credits.append(0.0)
    if right and "color" in need:
      colored = _of_color(detected, need["color"])
      credits.append(_closeness(count, colored))
      right = colored == count
    if right and "position" in need:
      relation, index = need["position"]
      targets = matched[index]
      if targets is None:
        credits.append(0.0)
        right = False
      else:
        right = _all_related(detected, targets, relation)
        credits += [1.0] if right else [0.0, 1.0]
    matched.append(list(detected) if right else None)
  return (sum(credits) / len(credits) if credits else 0.0), all(m is not None for m in matched)


def official(record: Mapping, objects: Mapping[str, list[Detection]]) -> bool:
  """GenEval's verdict: at least `count` objects, the best `count` judged, `exclude` obeyed."""
  matched: list[list[Detection] | None] = []
  for need in record["include"]:
    count = need["count"]
    detected = objects.get(need["class"], [])[:count]
    right = len(detected) >= count
    if right and "color" in need:
      right = _of_color(detected, need["color"]) >= count
    if right and "position" in need:
      relation, index = need["position"]
      right = matched[index] is not None and _all_related(detected, matched[index], relation)
    matched.append(detected if right else None)
  excluded = any(
    len(objects.get(ban["class"], [])) >= ban["count"] for ban in record.get("exclude", [])
  )
  return all(m is not None for m in matched) and not excluded


def judge(record: Mapping, detections: Sequence[Detection]) -> Verdict:
  """Compares the objects found in one image with its record."""
  objects = confident(detections, record["tag"])
  soft, strict = soft_and_strict(record, objects)
  return Verdict(soft, strict, official(record, objects))


def check_record(record: object, where: str) -> None:
  """Raises UserError unless `record` is a GenEval record; `where` names its place."""
  keys = ("tag", "include")
  if not isinstance(record, Mapping) or not all(key in record for key in keys):
    raise UserError(
      f"{where}: geneval needs a record with 'tag' and 'include' for every prompt, got {record!r}; "
      "use a GenEval *_metadata.jsonl prompt file"
    )
  if record["tag"] not in TAGS:
    raise UserError(f"{where}: unknown tag {record['tag']!r}; known: {', '.join(TAGS)}")
  for index, need in enumerate(record["include"]):
    place = f"{where}: include[{index}]"
    if "class" not in need or not isinstance(need.get("count"), int) or need["count"] < 1:
      raise UserError(f"{place} needs a 'class' and a positive integer 'count', got {need!r}")
    if "position" in need and not 0 <= need["position"][1] < index:
      raise UserError(f"{place} relates to entry {need['position'][1]}, which does not precede it")


class GenEval:
  """GenEval as a reward: `scorer(images, prompts, metadata) -> {output: [B] float32}`.

  Outputs: `geneval` (soft score), `strict_accuracy`, `accuracy` (official) and for each tag
  `<tag>_strict_accuracy` and `<tag>_accuracy`, which hold -10 in the rows of other tags. Not
  differentiable.
  """

  def __init__(self, detector: Detector):
    self.detector = detector

  def __call__(
    self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping]
  ) -> dict[str, np.ndarray]:
    """Scores uint8 images `[B, H, W, 3]` against their GenEval records.

    Raises:
      UserError: a record is missing or malformed.
      ValueError: the lengths differ, or the images are not uint8 `[B, H, W, 3]`.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
      raise ValueError(f"images must be uint8 [B, H, W, 3], got {images.dtype} {images.shape}")
    if metadata is None:
      raise UserError("geneval needs a record for every prompt, got none; use *_metadata.jsonl")
    if not len(images) == len(prompts) == len(metadata):
      raise ValueError(f"{len(images)} images, {len(prompts)} prompts, {len(metadata)} records")
    for index, record in enumerate(metadata):
      check_record(record, f"metadata[{index}]")
    verdicts = [
      judge(r, detected) for r, detected in zip(metadata, self.detector(images), strict=True)
    ]
    columns = np.asarray(verdicts, np.float32).reshape(-1, 3).T
    scores = {"geneval": columns[0], "strict_accuracy": columns[1], "accuracy": columns[2]}
    tags = np.asarray([record["tag"] for record in metadata], dtype=object)
    for tag in TAGS:
      for name in ("strict_accuracy", "accuracy"):
        scores[f"{tag}_{name}"] = np.where(tags == tag, scores[name], np.float32(OTHER_TAG))
    return scores
