import json
import math
import shutil
import weakref

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from rtdmd_jax import cli, sample
from rtdmd_jax.config import load_config
from rtdmd_jax.datasets.prompts import Prompt
from rtdmd_jax.evaluate import suite
from rtdmd_jax.evaluate.suite import Drawn
from rtdmd_jax.pipeline import Pipeline
from rtdmd_jax.rewards.multi import make
from tests.support.paths import ROOT

HERE = __name__
CONFIG = ROOT / "configs/tiny_eval.py"
PROMPTS = [Prompt(text, {"prompt": text}) for text in ("dark", "light", "broken")]


class Brightness:
  """Mean of all pixels; fails on a prompt that asks for it."""

  def __call__(self, images, prompts, metadata):
    values = images.mean((1, 2, 3)) / 255
    return np.where([p == "broken" for p in prompts], np.nan, values)


def run(workdir, *flags):
  argv = ["evaluate", f"--config={CONFIG}", f"--workdir={workdir}", *flags]
  required = ("config", "workdir")
  return cli.run(suite.main, argv, define_flags=suite.define_flags, requires=required)


def drawn(directory, level, prompts=PROMPTS, seeds=(1,)):
  """Plain images of a grey level, as `sample` writes them."""
  how = sample.Settings.from_config(load_config(str(ROOT / "configs/tiny_infer.py")))
  for i, prompt in enumerate(prompts):
    for seed in seeds:
      shot = sample.Shot(i, prompt.text, seed)
      image = np.full((8, 8, 3), level + 10 * i, np.uint8)
      sample.write(image, shot.path(directory), shot.notes(how))
  return directory


def test_every_image_is_scored_and_systems_are_compared(tmp_path, capsys):
  config = load_config(str(CONFIG))
  name = f"{HERE}:Brightness"
  systems = [
    Drawn(n, 4, 1.0, {"set": drawn(tmp_path / n, level, seeds=(1, 2))})
    for n, level in (("low", 50), ("high", 150))
  ]
  work = tmp_path / "work"
  suite.compare(config, systems, {"set": PROMPTS}, {"set": make({name: 1.0})}, work)
  lines = [json.loads(line) for line in (work / "scores.jsonl").read_text().splitlines()]
  assert len(lines) == 12
  assert lines[3]["scores"][name] == pytest.approx(60 / 255)
  assert (lines[3]["prompt"], lines[3]["seed"], lines[3]["system"]) == ("light", 2, "low")
  assert lines[5]["scores"][name] is None
  low, high = json.loads((work / "summary.json").read_text())["systems"]
  assert low["scores"][name]["mean"] == pytest.approx(55 / 255)
  assert low["scores"][name]["n"] == 4
  assert high["scores"][name]["mean"] == pytest.approx(155 / 255)
  assert math.isfinite(low["scores"][name]["ci95"])
  report = (work / "report.html").read_text()
  assert "Brightness" in report and report.count("<img") >= 6
  assert "high" in capsys.readouterr().out


def test_a_prompt_that_comes_again_is_another_image(tmp_path):
  config = load_config(str(CONFIG))
  name, twice = f"{HERE}:Brightness", [PROMPTS[0]] * 2
  system = Drawn("one", 4, 1.0, {"set": drawn(tmp_path / "one", 50, twice)})
  suite.compare(config, [system], {"set": twice}, {"set": make({name: 1.0})}, tmp_path)
  lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
  assert [line["prompt_index"] for line in lines] == [0, 1]
  assert lines[0]["scores"] != lines[1]["scores"]
  (row,) = json.loads((tmp_path / "summary.json").read_text())["systems"]
  assert row["scores"][name]["n"] == 2


def test_images_of_other_prompts_are_refused(tmp_path):
  drawn(tmp_path, 9, PROMPTS[:2])
  with pytest.raises(suite.UserError, match="no image of prompt 2, 'broken'"):
    suite.images_of(tmp_path, PROMPTS)
  with pytest.raises(suite.UserError, match="00000_1.png is not an image of prompt 0, 'light'"):
    suite.images_of(tmp_path, PROMPTS[1::-1])


def test_images_of_two_sizes_are_named(tmp_path):
  drawn(tmp_path, 9, PROMPTS[:1], seeds=(1, 2, 3))
  other = tmp_path / "00000_3.png"
  Image.new("RGB", (16, 8)).save(other)
  files = [tmp_path / f"00000_{i}.png" for i in (1, 2, 3)]
  scorer = make({f"{HERE}:Brightness": 1.0})
  for chunk in (2, 3):
    with pytest.raises(suite.UserError, match="1.png is 8 x 8 ..*00000_3.png is 16 x 8"):
      suite.score(scorer, files, PROMPTS[:1] * 3, chunk)


def test_outputs_of_single_tags_are_left_to_the_summary(tmp_path):
  file = drawn(tmp_path, 9, PROMPTS[:1]) / "00000_1.png"
  scorer = make({"geneval": 1.0}, options={"geneval": {"detector": "shapes"}})
  record = {"tag": "colors", "include": [{"class": "ring", "count": 1, "color": "red"}]}
  scores = suite.score(scorer, [file], [Prompt("a", record)], 4)
  assert scores.values.keys() == {"geneval", "strict_accuracy", "accuracy"}
  assert scores.values["geneval"] == 0 and not scores.reasons


class Fails:
  """Raises where a prompt asks for it; there is no such file to build `Absent` from."""

  def __call__(self, images, prompts, metadata):
    if "broken" in prompts:
      raise TimeoutError("no answer")
    return images.mean((1, 2, 3)) / 255


def Absent():
  raise FileNotFoundError("judge.pt")


def test_a_reward_that_fails_or_is_missing_is_counted_and_named(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(suite, "_SCORED", 2)
  fails, absent = f"{HERE}:Fails", f"{HERE}:Absent"
  with load_config(str(CONFIG)).unlocked() as config:
    config.batch = 2
    config.rewards = ConfigDict(allow_dotted_keys=True)
    config.rewards[fails], config.rewards[absent] = {"prompts": "set"}, {"prompts": "other"}
  scorers = suite.rewards_by_set(config)
  assert "prompt set other is not drawn" in capsys.readouterr().out
  systems = [Drawn("low", 4, 1.0, {"set": drawn(tmp_path / "low", 50)})]
  sets = {"other": PROMPTS[:1], "set": PROMPTS}
  suite.compare(config, systems, sets, scorers, tmp_path / "work")
  (row,) = json.loads((tmp_path / "work/summary.json").read_text())["systems"]
  first = row["scores"][fails]  # of the first call, of two images
  assert (first["n"], first["failed"], first["reason"]) == (2, 1, "TimeoutError: no answer")
  assert row["scores"][absent] == {
    "mean": None,
    "ci95": None,
    "n": 0,
    "failed": 1,
    "reason": "left out since the start: FileNotFoundError: judge.pt",
  }
  said = capsys.readouterr().out
  assert f"warning: low: reward {fails} failed on 1 of its images: TimeoutError: no answer" in said
  assert "1 failed" in (tmp_path / "work/report.html").read_text()


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--config.rewards.geneval.prompts=nowhere"], "rewards.geneval.prompts is 'nowhere'"),
    (["--config.systems.base.steps=0"], "steps is 0"),
    (["--images=x"], "--images=x must be NAME=DIR"),
    (["--images=x=nowhere"], "holds no images"),
    (["--config.prompts.shapes=nowhere"], "nowhere"),
    (["--config.dtype=int8"], "dtype is 'int8'"),
  ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, flags, message):
  assert run(tmp_path / "out", *flags) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ") and message in err and err.count("\n") == 1
  assert not (tmp_path / "out").exists()


@pytest.fixture
def two_pipelines(tmp_path):
  """A config of `base` from a pipeline of its own and `same` from the config's."""
  other = shutil.copytree(ROOT / "rtdmd_jax/assets/tiny", tmp_path / "other")
  file = other / "scheduler/scheduler_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"shift": 9.0}))
  own = tmp_path / "own.py"
  own.write_text(
    f"""from rtdmd_jax.config import load_config

def get_config():
  c = load_config({str(CONFIG)!r}, ["limit=1", "batch=1", "preview=1"]).unlock()
  c.systems = dict(
    base=dict(few_step=False, steps=2, guidance=1.0, loras=(), pipeline={str(other)!r}),
    same=dict(few_step=False, steps=2, guidance=1.0, loras=()),
  )
  return c
"""
  )
  return own, other


def test_systems_are_drawn_pipeline_by_pipeline(two_pipelines):
  config, other = load_config(str(two_pipelines[0])), str(two_pipelines[1])
  with config.unlocked():
    config.systems.again = config.systems.base
  found = suite.by_pipeline(config, ["base", "same", "again"])
  assert found == {other: ["base", "again"], config.pipeline: ["same"]}


@pytest.mark.slow
def test_a_system_has_a_pipeline_of_its_own(tmp_path, two_pipelines, monkeypatch):
  config, other = two_pipelines
  loaded, load = [], Pipeline.from_pretrained

  def watch(directory, **options):
    assert not any(reference() for _, reference in loaded), "the one before is still in memory"
    pipeline = load(directory, **options)
    loaded.append((str(directory), weakref.ref(pipeline)))
    return pipeline

  monkeypatch.setattr(suite.Pipeline, "from_pretrained", watch)
  assert run(tmp_path / "out", f"--config={config}") == 0
  assert [directory for directory, _ in loaded] == [str(other), load_config(str(config)).pipeline]
  names = ("base", "same")
  rows = json.loads((tmp_path / "out/summary.json").read_text())["systems"]
  assert [row["name"] for row in rows] == list(names)
  files = [tmp_path / f"out/images/{name}/shapes/00000_42.png" for name in names]
  notes = [sample.read_notes(file)["pipeline"] for file in files]
  assert notes == [directory for directory, _ in loaded]
  base, same = (np.asarray(Image.open(file)) for file in files)
  assert not np.array_equal(base, same)


def test_every_pipeline_is_looked_for_before_the_first_image(tmp_path, two_pipelines, capsys):
  config, other = two_pipelines
  (other / "model_index.json").unlink()
  assert run(tmp_path / "out", f"--config={config}") == 2
  assert f"{other / 'model_index.json'} cannot be read" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_tiny_suite_draws_scores_and_resumes(tmp_path, capsys):
  flags = ["--config.limit=3", "--config.batch=3", "--config.systems.teacher.steps=2"]
  assert run(tmp_path / "a", *flags) == 0
  rows = json.loads((tmp_path / "a/summary.json").read_text())["systems"]
  assert [row["name"] for row in rows] == ["teacher", "base", "cold_start"]
  assert {"clipscore", "geneval", "strict_accuracy"} <= rows[0]["scores"].keys()
  before = (tmp_path / "a/scores.jsonl").read_text()
  capsys.readouterr()
  images = f"--images=again={tmp_path / 'a/images/base'}"
  assert run(tmp_path / "a", *flags, images) == 0
  assert "3 images drawn" not in capsys.readouterr().out
  after = (tmp_path / "a/scores.jsonl").read_text()
  assert after.startswith(before)
  scores = [json.loads(line)["scores"] for line in after.splitlines()]
  assert scores[9:] == scores[3:6]
