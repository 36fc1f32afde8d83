"""What benchmarks/mistakes.py calls the objects of an image."""

import numpy as np
import pytest

from benchmarks import mistakes
from rtdmd_jax.datasets.shapes.draw import WASHED_OUT, draw
from rtdmd_jax.datasets.shapes.grammar import all_records
from rtdmd_jax.rewards.host.geneval import Detection

RECORD = {
  "tag": "color_attr",
  "include": [
    {"class": "circle", "count": 1, "color": "red"},
    {"class": "square", "count": 1, "color": "blue"},
  ],
}


@pytest.mark.parametrize(
  "colors, expected",
  [
    (["red"], "right"),
    ([], "too few"),
    (["red", "red"], "too many"),
    (["blue"], "colour of another object"),
    (["green"], "other colour"),
  ],
)
def test_verdicts(monkeypatch, colors, expected):
  found = {"circle": [Detection("circle", (0, 0, 1, 1), 1.0, color) for color in colors]}
  assert mistakes.verdict(RECORD["include"][0], RECORD, found) == expected
  assert expected in mistakes.VERDICTS


def test_without_a_colour_counts_decide(monkeypatch):
  need = {"class": "circle", "count": 2}
  found = {"circle": [Detection("circle", (0, 0, 1, 1), 1.0, c) for c in ("red", "blue")]}
  assert mistakes.verdict(need, {"tag": "counting", "include": [need]}, found) == "right"


def test_tells_washed_out_images(monkeypatch):
  records = [r for r in all_records() if r["tag"] == "colors"]
  for contrast, washed in ((1.0, False), (WASHED_OUT[1], True)):
    rng = np.random.default_rng(0)
    images = np.stack([draw(record, rng, contrast=contrast)[0] for record in records])
    np.testing.assert_array_equal(mistakes.washed_out(images), washed)
