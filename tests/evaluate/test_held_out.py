"""Evaluations of a run: every reward on its own prompts, and nothing in them ends it."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rtdmd_jax import cli, main
from rtdmd_jax.datasets.prompts import Prompt
from rtdmd_jax.evaluate import held_out, systems
from rtdmd_jax.evaluate.evaluator import Look
from rtdmd_jax.rewards.held_out_sets import HeldOut
from rtdmd_jax.rewards.isolated import Scores
from rtdmd_jax.runtime.metrics import MetricWriter, read_metrics
from tests.support.paths import CONFIGS
from tests.support.reward_faults import number, serving

COLOURS = [Prompt(text, {}) for text in ("red", "green", "blue")]
SIGNS = [Prompt(text, {}) for text in ("stop", "go")]


class Fake:
  """An evaluator without networks; `images` and `preview` say what it does."""

  def __init__(self, problem="", preview=None):
    self.problem, self.preview, self.seen = problem, preview, []

  def look(self, system, prompts, rewards, more=()):
    self.seen.append(([p.text for p in prompts], list(rewards), len(more)))
    values = {name: np.arange(len(prompts), dtype=np.float32) for name in rewards}
    reasons = {}
    if "ocr" in values:
      values["ocr"][0] = np.nan
      reasons["ocr"] = "no answer"
    images = np.random.default_rng(0).integers(0, 255, (len(prompts) + len(more), 8, 8, 3))
    return Look(images.astype(np.uint8), Scores(values, reasons), self.problem)

  def teacher_images(self, system, prompts):
    if self.preview is not None:
      raise self.preview
    return np.zeros((len(prompts), 8, 8, 3), np.uint8)

  def predictions(self, system, fake_score, prompts):
    return np.zeros((len(prompts), 8, 8, 3), np.uint8)


@pytest.fixture
def look(tmp_path, monkeypatch):
  """Evaluates step 7 of a run with an evaluator; the lines of metrics.jsonl."""
  monkeypatch.setattr(systems, "generator", lambda *_: "generator")
  monkeypatch.setattr(systems, "teacher", lambda *_: SimpleNamespace(steps=2))
  config = SimpleNamespace(
    rewards={"clipscore": SimpleNamespace(weight=1.0)},
    eval=SimpleNamespace(prompts=2, preview=2),
  )
  sets = [HeldOut("colours", COLOURS, ("clipscore",)), HeldOut("signs", SIGNS, ("ocr", "hpsv3"))]

  def run(evaluator, sets=sets):
    setup = SimpleNamespace(held_out_sets=sets)
    state = SimpleNamespace(ema={}, fake_score={})
    with MetricWriter(tmp_path, resume_step=-1) as writer:
      held_out.evaluate(config, setup, evaluator, state, 7, writer, tmp_path)
    return read_metrics(tmp_path / "metrics.jsonl")

  return run


def test_each_set_is_drawn_once_and_its_rewards_score_it(look, tmp_path):
  fake = Fake()
  scores, warning = look(fake)
  (colours, first, more), (signs, second, none) = fake.seen
  assert len(colours) == 2 and set(colours) < {"red", "green", "blue"}
  assert sorted(signs) == ["go", "stop"] and (first, second) == (["clipscore"], ["ocr", "hpsv3"])
  assert (more, none) == (8, 0)  # for the diversity of the first set
  values = scores["scalars"]
  assert (values["eval/clipscore"], values["eval/ocr"], values["eval/hpsv3"]) == (0.5, 1.0, 0.5)
  assert [values[f"eval/{n}_failed"] for n in ("clipscore", "ocr", "hpsv3")] == [0, 1, 0]
  assert "images/diversity" in values and (tmp_path / "previews/step_000007.png").exists()
  said = "step 7: reward ocr failed on 1 of 2 held-out images: no answer"
  assert warning["warning"] == said


def test_a_stage_without_rewards_still_has_previews_and_statistics(look, tmp_path):
  (line,) = look(Fake(), [HeldOut("colours", COLOURS, ())])
  assert "images/dark_share" in line["scalars"] and "eval" not in str(line)
  assert (tmp_path / "previews/step_000007.png").exists()


def test_what_goes_wrong_around_the_scores_is_a_warning(look, tmp_path):
  (tmp_path / "monitor.json").write_text("{")
  (tmp_path / "previews").write_text("a file")
  lines = look(Fake(problem="1 of 10 images are not finite"))
  assert "images/dark_share" not in lines[0]["scalars"]
  said = [line["warning"] for line in lines[1:]]
  assert said[0] == "step 7: prompts of colours: 1 of 10 images are not finite"
  assert any(
    "comparison with the first evaluation failed: " in s and "remove it" in s for s in said
  )
  assert any("writing the preview failed: " in s for s in said)
  lines = look(Fake(preview=RuntimeError("out of memory")))
  lost = "step 7: drawing the preview failed: RuntimeError: out of memory"
  assert lost in [line.get("warning") for line in lines]


def test_an_error_of_the_device_ends_all_of_several_processes(look, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(RuntimeError, match="out of memory"):
    look(Fake(preview=RuntimeError("out of memory")))


def Raises():
  def score(images, prompts, metadata):
    raise RuntimeError("no memory")

  return score


def TimesOut():
  def score(images, prompts, metadata):
    raise TimeoutError("waited for long")

  return score


def WrongShape():
  return lambda images, prompts, metadata: np.ones((len(images), 2))


def Half():
  """Scores every second image."""
  return lambda images, prompts, metadata: np.where(np.arange(len(images)) % 2, np.nan, 1.0)


CONFIG = """
import sys
sys.path.insert(0, {configs!r})
import {stage} as stage

def get_config():
  c = stage.get_config()
  c.batch.prompts = c.batch.images_per_prompt = 2
  c.batch.micro_batches = 1
  c.eval.final_prompts = c.eval.prompts = c.eval.chunk = 4
  c.eval.preview = c.eval.teacher_steps = c.train.steps = 2
  c.eval.final_images = 1
  c.eval.every = 1
  c.train.fake_update_ratio = 1
{more}
  return c
"""


def _run(folder, stage, more):
  config = folder / "config.py"
  text = CONFIG.format(configs=str(CONFIGS), stage=stage, more=more)
  config.write_text(text)
  argv = ["main", f"--config={config}", f"--workdir={folder / 'run'}"]
  return cli.run(main.main, argv, define_flags=main.define_flags, requires=("config", "workdir"))


@pytest.mark.slow
def test_a_run_ends_well_however_its_held_out_rewards_fail(tmp_path, capsys, monkeypatch):
  (tmp_path / "own").mkdir()
  (tmp_path / "own/test.txt").write_text("a photo of a cat\na photo of a dog\n")
  own, names = str(tmp_path / "own"), ("Raises", "TimesOut", "WrongShape", "Half")
  fails = [f"{__name__}:{name}" for name in (*names, "Absent")]
  with serving({"hpsv3": number}) as server:
    port = server.server_port
    more = f"""
  c.rewards.geneval.held_out = {own!r}  # prompts without records
  c.eval.rewards.aesthetic = dict(directory="nowhere", weights="nowhere.pth")
  c.eval.rewards.ocr = dict(held_out={own!r}, url="http://127.0.0.1:9", attempts=1)
  c.eval.rewards.hpsv3 = dict(url="http://127.0.0.1:{port}", attempts=1, held_out={own!r})
  for name in {fails!r}:
    c.eval.rewards[name] = dict()
"""
    look = held_out.evaluate

    def once(*args):
      look(*args)
      server.shutdown()  # the service is down after the first evaluation
      server.server_close()

    monkeypatch.setattr("rtdmd_jax.train.evaluate", once)
    assert _run(tmp_path, "tiny_stage2", more) == 0
  out = capsys.readouterr().out
  assert "warning: rewards.geneval cannot score 2 of the 2 prompts" in out
  work = tmp_path / "run"
  table = json.loads((work / "evaluation.json").read_text())
  for system in table["systems"]:
    scores = system["scores"]
    assert (scores["clipscore"]["n"], scores["clipscore"]["failed"]) == (4, 0)
    assert (scores[fails[3]]["n"], scores[fails[3]]["failed"]) == (2, 2)
    for name, count, reason in [
      ("geneval", 2, "geneval needs a record with 'tag' and 'include'"),
      ("hpsv3", 2, "Connection"),
      ("ocr", 2, "left out since the start: "),
      ("aesthetic", 4, "left out since the start: "),
      (fails[0], 4, "RuntimeError: no memory"),
      (fails[1], 4, "TimeoutError: waited for long"),
      (fails[2], 4, "has shape (4, 2), not [4]"),
      (fails[4], 4, "left out since the start: "),
    ]:
      score = scores[name]
      assert (score["mean"], score["n"], score["failed"]) == (None, 0, count), name
      assert reason in score["reason"], (name, score["reason"])
  lines = read_metrics(work / "metrics.jsonl")
  first, _, last = [
    line["scalars"] for line in lines if "eval/clipscore" in line.get("scalars", {})
  ]
  assert first["eval/hpsv3"] is not None and first["eval/hpsv3_failed"] == 0
  assert last["eval/hpsv3"] is None and last["eval/hpsv3_failed"] == 2
  assert last["eval/geneval"] is None and last["eval/geneval_failed"] == 2
  trained = [line["scalars"].get("reward/geneval") for line in lines if "scalars" in line]
  assert len([mean for mean in trained if mean is not None]) == 2  # training scores as ever
  said = [line["warning"] for line in lines if "warning" in line]
  assert any(s.startswith("step 2: reward hpsv3 failed on 2 of 2 held-out images") for s in said)
  assert (work / "export/generator/adapter_model.safetensors").exists()
  assert "failed" in (work / "report.html").read_text()


@pytest.mark.slow
def test_stage_1_without_rewards_ends_well(tmp_path):
  more = "\n  for name in list(c.rewards):\n    del c.rewards[name]\n"
  assert _run(tmp_path, "tiny_stage1", more) == 0
  work = tmp_path / "run"
  table = json.loads((work / "evaluation.json").read_text())
  assert [system["scores"] for system in table["systems"]] == [{}, {}, {}]
  assert "Held-out scores" not in (work / "export/generator/README.md").read_text()
  assert "no reward scored them" in (work / "report.html").read_text()
  assert list((work / "previews").glob("*.png"))
