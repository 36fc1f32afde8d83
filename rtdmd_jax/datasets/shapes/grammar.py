"""Every prompt of the shapes set as a GenEval record, and its train / held-out split.

A record is GenEval's (Ghosh et al. 2023, arXiv 2310.11513):
`{"tag", "include": [{"class", "count", "color"?, "position"?: [relation, index]}], "exclude"?,
"prompt"}`; `position` relates the entry to the include entry at `index`, and `exclude` stands on
counting records only.
"""

import hashlib
import json
from itertools import permutations

from rtdmd_jax.rewards.geneval import TAGS as TAGS

SHAPES = ("circle", "square", "triangle", "cross", "ring")
# GenEval's colours without orange, brown and white, which a blurred edge of another colour or the
# light background imitates.
COLORS = ("red", "yellow", "green", "blue", "purple", "pink", "black")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {2: "two", 3: "three", 4: "four"}
HELD_OUT_SHARE = 0.12
_OPPOSITE = {"right of": "left of", "below": "above"}


def _plural(name: str) -> str:
  return name + ("es" if name.endswith("s") else "s")


def _record(tag: str, include: list[dict], phrase: str, exclude: list[dict] | None = None) -> dict:
  record = {"tag": tag, "include": include}
  if exclude:
    record["exclude"] = exclude
  return record | {"prompt": f"a photo of {phrase}"}


def _one(name: str, **extra) -> dict:
  return {"class": name, "count": 1, **extra}


def all_records() -> list[dict]:
  """Returns every record of the grammar, in a fixed order; prompts are unique.

  Ordered pairs of different shapes for the two-object tags; different colours for `color_attr`.
  The longest prompt has 10 words.
  """
  pairs = list(permutations(SHAPES, 2))
  records = [_record("single_object", [_one(a)], f"a {a}") for a in SHAPES]
  records += [_record("two_object", [_one(a), _one(b)], f"a {a} and a {b}") for a, b in pairs]
  records += [
    _record(
      "counting",
      [{"class": a, "count": n}],
      f"{word} {_plural(a)}",
      exclude=[{"class": a, "count": n + 1}],
    )
    for a in SHAPES
    for n, word in COUNTS.items()
  ]
  records += [_record("colors", [_one(a, color=c)], f"a {c} {a}") for a in SHAPES for c in COLORS]
  records += [
    _record("position", [_one(b), _one(a, position=[relation, 0])], f"a {a} {relation} a {b}")
    for a, b in pairs
    for relation in RELATIONS
  ]
  records += [
    _record("color_attr", [_one(a, color=c), _one(b, color=d)], f"a {c} {a} and a {d} {b}")
    for a, b in pairs
    for c, d in permutations(COLORS, 2)
  ]
  return records


def _scene_key(record: dict) -> str:
  """A key shared by records that describe the same scenes in another order of words."""
  include = record["include"]
  if record["tag"] == "position":
    other, subject = include[0]["class"], include[1]["class"]
    relation = include[1]["position"][0]
    if relation in _OPPOSITE:
      subject, other, relation = other, subject, _OPPOSITE[relation]
    return json.dumps([record["tag"], subject, relation, other])
  return json.dumps([record["tag"], sorted(json.dumps(i, sort_keys=True) for i in include)])


def split(records: list[dict]) -> tuple[list[dict], list[dict]]:
  """Splits records into `(train, held_out)`, tag by tag, by a hash of the scene described.

  Two prompts for the same scenes ("a circle left of a square", "a square right of a circle") stay
  on one side. A `HELD_OUT_SHARE` of the scenes of each tag, and at least one, is held out; the
  order of `records` is kept and does not influence the split.

  Raises:
    ValueError: a tag has a single scene, so that one side would be empty.
  """
  held_out_keys = set()
  for tag in sorted({r["tag"] for r in records}):
    keys = {_scene_key(r) for r in records if r["tag"] == tag}
    if len(keys) < 2:
      raise ValueError(f"tag {tag!r} needs at least two different scenes to split")
    ranked = sorted(keys, key=lambda k: hashlib.sha256(k.encode()).digest())
    held_out_keys.update(ranked[: max(1, round(HELD_OUT_SHARE * len(ranked)))])
  train = [r for r in records if _scene_key(r) not in held_out_keys]
  return train, [r for r in records if _scene_key(r) in held_out_keys]
