"""GenEval's prompts over the COCO classes: a training set of any size, and the published test.

`python -m rtdmd_jax.datasets.geneval --out=prompts/geneval` writes `train_metadata.jsonl`, whose
scenes do not occur in the test, and `test_metadata.jsonl`, the 553 published records four times in
one random order after another: 2,212 lines, for four images of each. It reads nothing but the
records of `--exclude`, whose scenes are left out besides.
"""

import json
import math
import sys
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from absl import flags

from rtdmd_jax import cli
from rtdmd_jax.datasets import geneval_records as make
from rtdmd_jax.datasets.geneval_records import CLASSES, COLORS, COUNTS, RELATIONS, scene_key
from rtdmd_jax.datasets.prompts import load_prompts
from rtdmd_jax.errors import UserError

IMAGES = 4  # of each record of the test, in the published evaluation
_COLOURED = CLASSES[1:]  # there are no coloured persons
# Flow-GRPO's shares (arXiv 2505.05470, section 5): harder tags more often.
SHARES = {
  "position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1, "single_object": 0,
}  # fmt: skip


def training_records(
  count: int, seed: int, *, shares: dict[str, int] = SHARES, exclude: list[dict] | None = None
) -> list[dict]:
  """`count` records in random order, tags in proportion to `shares`.

  The scenes of a tag come in random order, each once before any comes again (there are 240 for
  counting).

  Args:
    count: how many.
    seed: of the order.
    shares: a whole number for each tag.
    exclude: records whose scenes, in any wording, are left out; `test_records()` by default.

  Raises:
    ValueError: a tag has a share, but no scene is left for it (the test has all single objects).
  """
  excluded = {scene_key(r) for r in (test_records() if exclude is None else exclude)}
  rng = np.random.default_rng(seed)
  total, records, before = sum(shares.values()), [], 0
  for tag, share in shares.items():
    before += share
    # Rounding the running sum keeps the total exact.
    wanted = round(count * before / total) - len(records)
    size, record = _SPACES[tag]
    scenes = (r for r in map(record, rng.permutation(size)) if r is not None)
    fresh = list(islice((r for r in scenes if scene_key(r) not in excluded), wanted))
    if wanted and not fresh:
      raise ValueError(f"every scene of {tag} is excluded; give it no share")
    records += islice(cycle(fresh), wanted)
  return [records[i] for i in rng.permutation(count)]


def test_records() -> list[dict]:
  """The 553 records of the published test, drawn again as its authors drew them (seed 43)."""
  rng = np.random.default_rng(43)

  def draw(names: tuple, *size: int):
    return np.asarray(names, object)[rng.choice(len(names), *size, replace=False)]

  records = [make.single_object(name) for name in draw(CLASSES, len(CLASSES))]
  records += [make.two_object(*draw(CLASSES, 2)) for _ in range(100)]
  records += [make.counting(_one(rng, CLASSES), int(rng.integers(2, 5))) for _ in range(100)]
  records += [make.colors(_one(rng, _COLOURED), _one(rng, COLORS)) for _ in range(100)]
  for _ in range(100):
    subject, other = draw(CLASSES, 2)
    records.append(make.position(subject, _one(rng, RELATIONS), other))
  for _ in range(100):
    (first, second), (color, second_color) = draw(_COLOURED, 2), draw(COLORS, 2)
    records.append(make.color_attr(first, color, second, second_color))
  return [json.loads(text) for text in dict.fromkeys(map(json.dumps, records))]


def evaluation_records() -> list[dict]:
  """The published evaluation's records: `test_records()` four times, each time in another order.

  An image a record makes four of each; of every 553 in a row, each comes once.
  """
  records = test_records()
  orders = (np.random.default_rng(i).permutation(len(records)) for i in range(IMAGES))
  return [records[i] for order in orders for i in order]


def read_records(path: str | Path) -> list[dict]:
  """The records of a file of GenEval metadata, such as the published evaluation_metadata.jsonl.

  Raises:
    UserError: the file cannot be read, or a record (named by its number) is not GenEval's.
  """
  records = [prompt.record for prompt in load_prompts(path, split="test", metadata=True)]
  for number, record in enumerate(records, start=1):
    try:
      scene_key(record)
    except (KeyError, IndexError, TypeError) as error:
      raise UserError(
        f"{path}, record {number}: needs GenEval's 'tag' and 'include' of things with their class,"
        " and for positions a second one with its position."
      ) from error
  return records


def _one(rng: np.random.Generator, names: tuple[str, ...]) -> str:
  return names[rng.choice(len(names))]


def _space(record: Callable[..., dict], *axes: tuple) -> tuple[int, Callable[[int], dict | None]]:
  """Number of combinations of the axes, and the record of each; None where a value repeats."""

  def make_one(index: int) -> dict | None:
    places = np.unravel_index(index, [len(axis) for axis in axes])
    values = [axis[place] for axis, place in zip(axes, places, strict=True)]
    return record(*values) if len(set(values)) == len(values) else None

  return math.prod(map(len, axes)), make_one


_SPACES = {
  "single_object": _space(make.single_object, CLASSES),
  "two_object": _space(make.two_object, CLASSES, CLASSES),
  "counting": _space(make.counting, CLASSES, tuple(COUNTS)),
  "colors": _space(make.colors, _COLOURED, COLORS),
  "position": _space(make.position, CLASSES, RELATIONS, CLASSES),
  "color_attr": _space(make.color_attr, _COLOURED, COLORS, _COLOURED, COLORS),
}


def define_flags(values: flags.FlagValues) -> None:
  """Adds this tool's flags."""
  flags.DEFINE_string("out", None, "Folder of the two files.", values)
  flags.DEFINE_integer("count", 50_000, "Training records.", 1, flag_values=values)
  flags.DEFINE_integer("seed", 0, "Of the training records.", 0, flag_values=values)
  flags.DEFINE_string("exclude", "", "GenEval metadata whose scenes are left out, too.", values)


def main(call: cli.Invocation) -> None:
  """Writes both files."""
  exclude = call.flags.exclude
  excluded = test_records() + (read_records(exclude) if exclude else [])
  try:
    train = training_records(call.flags.count, call.flags.seed, exclude=excluded)
  except ValueError as error:
    raise UserError(f"--exclude={exclude} leaves too little: {error}.") from error
  out = cli.make_folder(call.flags.out, "--out")
  files = {"train_metadata.jsonl": train, "test_metadata.jsonl": evaluation_records()}
  for name, records in files.items():
    text = "".join(json.dumps(record) + "\n" for record in records)
    (out / name).write_text(text, encoding="utf-8")
    print(f"{out / name}: {len(records)} records")


if __name__ == "__main__":
  sys.exit(cli.run(main, define_flags=define_flags, requires=("out",), shared=()))
