import json
from types import SimpleNamespace

import numpy as np
import pytest

from rtdmd_jax.evaluation import Evaluator, System, prompt_means
from rtdmd_jax.prompts import Prompt

PROMPTS = [Prompt(text, {"tag": "colors"}) for text in ("red", "blue", "green")]


def test_a_prompt_counts_once_however_many_of_its_images_have_a_score():
  values = np.array([1.0, np.nan, 3.0, 5.0, np.nan, np.nan])
  np.testing.assert_array_equal(prompt_means(values, 3), [3.0, np.nan, 3.0])


def test_systems_of_a_kind_differ_in_the_values_of_their_adapters_alone():
  levels = np.array([1.0, 0.5, 0.0], np.float32)
  system = System("a", 2, 1.0, levels, 0.9, "base", {"lora": np.zeros(2)})
  assert system._replace(name="b", adapters={"lora": np.ones(2)}).kind() == system.kind()
  others = [
    {"eta": 0.0},
    {"sigmas": levels**2},
    {"guidance": 3.0},
    {"base": "teacher"},
    {"adapters": {}},
  ]
  assert all(system._replace(**change).kind() != system.kind() for change in others)


class Fake(Evaluator):
  """Draws an image of (system, number) and scores it by a table."""

  SCORES = {"start": [0.0, 0.2, 0.4, 0.2, 0.4, 0.6], "result": [0.3, 0.6, 0.5, 0.5, 0.6, 0.7]}

  def __init__(self):
    self._config = SimpleNamespace(eval=SimpleNamespace(preview=2))

  def images(self, system, prompts):
    assert [p.text for p in prompts] == ["red", "blue", "green"] * 2
    self.name = system.name
    return np.zeros((6, 4, 4, 3), np.uint8)

  def scores(self, images, prompts):
    return {"geneval": np.array(self.SCORES[self.name])}


def test_systems_are_compared_prompt_by_prompt(tmp_path):
  systems = [System(name, 4, 1.0, np.zeros(5), 0.9, "", {}) for name in ("start", "result")]
  table = Fake().compare(systems, PROMPTS, tmp_path, 2)
  means = [s["scores"]["geneval"]["mean"] for s in table["systems"]]
  assert means == pytest.approx([0.3, 16 / 30])
  assert table["systems"][0]["per_tag"]["colors"]["geneval"]["n"] == 3
  difference = table["differences"]["start"]["geneval"]  # of 0.3, 0.3 and 0.1
  assert difference["mean"] == pytest.approx(7 / 30)
  assert difference["ci95"] == pytest.approx(1.96 * np.std([0.3, 0.3, 0.1], ddof=1) / 3**0.5)
  assert list(table["differences"]) == ["start"]
  assert json.loads((tmp_path / "evaluation.json").read_text()) == table
  assert len(list((tmp_path / "evaluation/result").iterdir())) == 2
