"""Every prompt of the shapes set as a GenEval record, and its train / held-out split."""

import hashlib
from itertools import permutations

from rtdmd_jax.datasets import geneval_records as make
from rtdmd_jax.datasets.geneval_records import COUNTS, RELATIONS, scene_key
from rtdmd_jax.datasets.geneval_records import TAGS as TAGS

SHAPES = ("circle", "square", "triangle", "cross")
# GenEval's colours without orange, purple, brown and white, which a blurred edge of another colour
# or the light background imitates.
COLORS = ("red", "yellow", "green", "blue", "pink", "black")
HELD_OUT_SHARE = 0.25


def all_records() -> list[dict]:
  """Returns every record of the grammar, in a fixed order; prompts are unique.

  Ordered pairs of different shapes for the two-object tags; different colours for `color_attr`.
  The longest prompt has 10 words.
  """
  pairs = list(permutations(SHAPES, 2))
  return [
    *(make.single_object(a) for a in SHAPES),
    *(make.two_object(a, b) for a, b in pairs),
    *(make.counting(a, n) for a in SHAPES for n in COUNTS),
    *(make.colors(a, c) for a in SHAPES for c in COLORS),
    *(make.position(a, relation, b) for a, b in pairs for relation in RELATIONS),
    *(make.color_attr(a, c, b, d) for a, b in pairs for c, d in permutations(COLORS, 2)),
  ]


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
    keys = {scene_key(r) for r in records if r["tag"] == tag}
    if len(keys) < 2:
      raise ValueError(f"tag {tag!r} needs at least two different scenes to split")
    ranked = sorted(keys, key=lambda k: hashlib.sha256(k.encode()).digest())
    held_out_keys.update(ranked[: max(1, round(HELD_OUT_SHARE * len(ranked)))])
  train = [r for r in records if scene_key(r) not in held_out_keys]
  return train, [r for r in records if scene_key(r) in held_out_keys]
