import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rtdmd_jax.datasets.prompts import Prompt
from rtdmd_jax.errors import UserError
from rtdmd_jax.evaluate.evaluator import Evaluator
from rtdmd_jax.evaluate.scores import failure_texts, prompt_means
from rtdmd_jax.evaluate.systems import System
from rtdmd_jax.report.page import write_report
from rtdmd_jax.rewards.held_out_sets import HeldOut, held_out_sets, shortages
from rtdmd_jax.rewards.isolated import Scores

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

  SCORES = {
    "start": [0.0, 0.2, 0.4, 0.2, 0.4, 0.6],
    "result": [0.3, 0.6, 0.5, 0.5, 0.6, 0.7],
  }

  def __init__(self):
    self._config = SimpleNamespace(eval=SimpleNamespace(preview=2))
    self.seen = []

  def _program(self, system):
    return system.name

  def _draw(self, program, adapters, prompts):
    self.seen.append((program, [p.text for p in prompts]))
    if program == "result" and prompts[0].text == "sign":
      raise RuntimeError("out of memory\nof the device")
    finite = np.array([p.text != "blurred" for p in prompts])
    return np.zeros((len(prompts), 4, 4, 3), np.uint8), finite

  def scores(self, images, prompts, rewards):
    if "geneval" in rewards:
      return Scores({"geneval": np.array(self.SCORES[self.seen[-1][0]], np.float32)}, {})
    return Scores({name: np.ones(len(prompts), np.float32) for name in rewards}, {})


SYSTEMS = [System(name, 4, 1.0, np.zeros(5), 0.9, "", {}) for name in ("start", "result")]


def test_systems_are_compared_prompt_by_prompt(tmp_path):
  fake = Fake()
  table = fake.compare(SYSTEMS, [HeldOut("colours", PROMPTS, ("geneval",))], tmp_path, 2)
  assert fake.seen == [(name, ["red", "blue", "green"] * 2) for name in ("start", "result")]
  means = [s["scores"]["geneval"]["mean"] for s in table["systems"]]
  assert means == pytest.approx([0.3, 16 / 30])
  assert table["systems"][0]["per_tag"]["colors"]["geneval"]["n"] == 3
  difference = table["differences"]["start"]["geneval"]  # of 0.3, 0.3 and 0.1
  assert difference["mean"] == pytest.approx(7 / 30)
  assert difference["ci95"] == pytest.approx(1.96 * np.std([0.3, 0.3, 0.1], ddof=1) / 3**0.5)
  assert list(table["differences"]) == ["start"]
  assert json.loads((tmp_path / "evaluation.json").read_text()) == table
  assert len(list((tmp_path / "evaluation/result").iterdir())) == 2


def test_each_reward_is_scored_on_its_own_prompts_and_what_fails_is_counted_and_named(
  tmp_path, capsys
):
  signs = [Prompt(text, {"tag": "text"}) for text in ("sign", "blurred")]
  sets = [HeldOut("colours", PROMPTS, ()), HeldOut("signs", signs, ("ocr", "hpsv3"))]
  fake = Fake()
  table = fake.compare(SYSTEMS, sets, tmp_path)
  texts = [p.text for p in PROMPTS]
  assert fake.seen == [(n, t) for t in (texts, ["sign", "blurred"]) for n in ("start", "result")]
  start, result = table["systems"]
  assert start["scores"]["ocr"] == {
    "mean": 1.0,
    "ci95": None,
    "n": 1,
    "failed": 1,
    "reason": "the image has pixels that are not finite",
  }
  assert set(start["per_tag"]) == {"text"} and start["per_tag"]["text"]["hpsv3"]["n"] == 1
  lost = "the images could not be drawn: RuntimeError: out of memory of the device"
  assert result["scores"] == {
    name: {"mean": None, "ci95": None, "n": 0, "failed": 2, "reason": lost}
    for name in ("ocr", "hpsv3")
  }
  assert table["differences"]["start"]["ocr"]["n"] == 0
  assert failure_texts(table["systems"])[-1] == (
    f"result: reward hpsv3 failed on 2 of its images: {lost}"
  )
  said = capsys.readouterr().out
  assert f"warning: result, prompts of signs: {lost}" in said
  assert "warning: start, prompts of signs: 1 of 2 images are not finite" in said
  assert table["prompts"] == ["red", "blue"]  # of the first set, whose images are shown
  assert len(list((tmp_path / "evaluation/start").iterdir())) == 2


def test_without_any_reward_the_images_are_still_drawn(tmp_path):
  table = Fake().compare(SYSTEMS, [HeldOut("colours", PROMPTS, ())], tmp_path)
  assert [s["scores"] for s in table["systems"]] == [{}, {}]
  assert table["differences"] == {"start": {}}
  assert "no reward scored them" in write_report(tmp_path).read_text()


def test_an_error_of_the_device_ends_all_of_several_processes(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(RuntimeError, match="out of memory"):
    Fake().look(SYSTEMS[1], [Prompt("sign", {})], ("ocr",))


def _config(**held_out):
  rewards = {name: {"held_out": path} if path else {} for name, path in held_out.items()}
  return SimpleNamespace(
    rewards={"clipscore": {"weight": 1.0}},
    eval=SimpleNamespace(rewards=rewards),
    data=SimpleNamespace(held_out="plain.txt"),
  )


@pytest.fixture
def prompt_files(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "plain.txt").write_text("a red ball\na sign\n")
  (tmp_path / "signs").mkdir()
  (tmp_path / "signs/test.txt").write_text('a sign that says "stop"\n')


def test_sets_are_grouped_by_path_and_the_previews_come_first(prompt_files):
  config = _config(ocr="signs", hpsv3="./signs/", aesthetic="", geneval="plain.txt")
  sets = held_out_sets(config)
  assert [(part.path, part.rewards) for part in sets] == [
    ("plain.txt", ("clipscore", "aesthetic", "geneval")),
    ("signs", ("ocr", "hpsv3")),
  ]
  assert [p.text for p in sets[0].prompts] == ["a red ball", "a sign"]
  (said,) = shortages(config, sets)
  assert said.startswith("eval.rewards.geneval cannot score 2 of the 2 prompts of plain.txt, the")
  assert "'a red ball'" in said and "GenEval record" in said


def test_a_missing_set_is_named_with_its_key(prompt_files):
  with pytest.raises(UserError, match="^eval.rewards.ocr.held_out: prompt file nowhere does not"):
    held_out_sets(_config(ocr="nowhere"))
  with pytest.raises(UserError, match="^eval.rewards.ocr.held_out is 3; name a prompt file"):
    held_out_sets(_config(ocr=3))
