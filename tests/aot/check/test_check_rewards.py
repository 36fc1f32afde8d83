"""`main --check` of rewards: options, files, prompts, and what they make of a grey image."""

import json
import re
import shutil
import sys

import pytest

from rtdmd_jax.aot.check import files, rewards
from rtdmd_jax.aot.check.report import Report
from rtdmd_jax.config import load_config
from rtdmd_jax.rewards.host import ocr
from tests.support.paths import CONFIGS
from tests.support.reward_faults import Proxy, number, running, serving

TINY = CONFIGS.parent / "rtdmd_jax/assets/tiny"
RECORD = {"prompt": "a red circle", "tag": "colors", "include": [{"class": "circle", "count": 1}]}


def check(sections, *overrides, evaluated=()):
  """The report on the rewards of a run that has these sections alone."""
  config = load_config(str(CONFIGS / "tiny_stage2.py"), overrides).unlock()
  for name in list(config.rewards):
    del config.rewards[name]
  for name, options in sections.items():
    place = config.eval.rewards if name in evaluated else config.rewards
    place[name] = options if name in evaluated else {"weight": 1.0, **options}
  report = Report()
  rewards.check_rewards(report, config, files.read_prompts(report, config))
  return report


def written(folder, name, values):
  file = folder / name
  lines = (json.dumps(v) if file.suffix == ".jsonl" else v for v in values)
  file.write_text("\n".join(lines))
  return file


@pytest.mark.parametrize(
  "name, options, message",
  [
    ("clipscroe", {}, "rewards.clipscroe: rewards: .* did you mean 'clipscore'"),
    ("clipscore", {"directory": str(TINY / "clip"), "size": 1}, "size"),
    ("clipscore", {"directory": str(TINY / "vae")}, "rewards.clipscore: .*vae"),
    ("clipscore", {"directory": "no_clip"}, "rewards.clipscore.directory is no_clip, which does"),
    ("ocr", {"url": "http://127.0.0.1:9"}, "cannot be reached"),
    ("ocr", {"backpropagate": True, "workers": 0}, "only clipscore"),
    ("nowhere:Reward", {}, "cannot import 'nowhere:Reward'"),
    ("geneval", {"detector": "shapes", "max_failed": 2}, "max_failed must be in 0..1"),
    ("hpsv3", {"directory": str(TINY)}, "HPSv3.safetensors does not exist"),
    ("geneval2", {"directory": str(TINY), "aggregate": "sum"}, "aggregate is 'sum'"),
  ],
)
def test_options_and_files(name, options, message):
  report = check({name: options})
  assert any(re.search(message, problem) for problem in report.problems), report


def test_all_missing_files_of_a_reward_are_named():
  problems = check({"hpsv2": {"weights": "no.pt", "directory": "no_clip"}}).problems
  assert [p.split(" is ")[0] for p in problems] == [
    "rewards.hpsv2.directory",
    "rewards.hpsv2.weights",
  ]


REWARDS = """
import numpy as np
def two(): return lambda images, prompts: np.zeros(len(images))
def channels(): return lambda images, prompts, records: images.mean(axis=(1, 2))
def one(): return lambda images, prompts, records: 0.5
def words(): return lambda images, prompts, records: ["good"] * len(images)
def nothing(): return lambda images, prompts, records: None
def unnamed(): return lambda images, prompts, records: {"a": np.zeros(len(images))}
def nan(): return lambda images, prompts, records: np.full(len(images), np.nan)
def good(gain=1.0): return lambda images, prompts, records: [gain] * len(images)
def thing(): return "a reward"
def raises(): raise KeyError("weights")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
  (tmp_path / "trial_rewards.py").write_text(REWARDS)
  monkeypatch.syspath_prepend(tmp_path)
  yield "trial_rewards"
  sys.modules.pop("trial_rewards", None)


@pytest.mark.parametrize(
  "name, message",
  [
    ("two", "TypeError: .* takes 2 positional arguments but 3 were given; a reward is called with"),
    ("channels", r"returns ndarray of shape \[2, 3\] for 2 images"),
    ("one", r"returns 0.5 of shape \[\] for 2 images"),
    ("words", "returns list, not numbers"),
    ("nothing", "returns None for 2 images"),
    ("unnamed", r"returns \['a'\], without its own name"),
    ("thing", "returns str, not a function of images"),
    ("raises", "cannot be built: KeyError: 'weights'"),
  ],
)
def test_whatever_a_reward_of_the_user_does_is_a_sentence(module, name, message):
  for evaluated in ((), (f"{module}:{name}",)):
    report = check({f"{module}:{name}": {}}, evaluated=evaluated)
    (problem,) = report.problems
    assert problem.startswith(f"{'eval.' * bool(evaluated)}rewards.{module}:{name}")
    assert re.search(message, problem), problem


def test_a_good_reward_passes_and_nan_is_a_warning(module):
  assert check({f"{module}:good": {"gain": 2.0}}) == check({f"{module}:good": {}})
  report = check({f"{module}:nan": {}})
  assert not report.problems and "gives nan for a grey image" in report.warnings[0]


def test_services_are_asked_to_score():
  with serving({"ocr": number}) as server:
    url = f"http://127.0.0.1:{server.server_port}"
    assert not check({"hpsv3": {"url": url, "reward": "ocr"}}).problems
    with running(Proxy(server.server_port, lambda n: "500")) as broken:
      report = check({"hpsv3": {"url": broken.url, "reward": "ocr"}})
  (problem,) = report.problems
  assert problem.startswith("rewards.hpsv3 cannot score a grey image: ") and "500" in problem


def test_prompts_that_a_reward_cannot_score(tmp_path):
  texts = written(tmp_path, "p.txt", ["a shop", 'a sign "Sale"', "a fox"])
  sets = [f"data.prompts={texts}", f"data.held_out={texts}"]
  training, held_out = check({"geneval": {"detector": "shapes"}}, *sets).problems
  assert training.startswith(f"rewards.geneval cannot score 3 of the 3 prompts of {texts}")
  assert held_out.endswith("Name other held-out prompts for it in rewards.geneval.held_out.")
  own = written(tmp_path, "own.jsonl", [RECORD, {"prompt": "a square"}])
  report = check({"geneval": {"detector": "shapes", "held_out": str(own)}}, *sets)
  assert report.problems == [training] and "1 of the 2 prompts of" in report.warnings[0]
  report = check({"geneval": {"detector": "shapes"}}, *sets, "stage=stage1")
  assert report.problems == [held_out]
  report = check(
    {"geneval": {"detector": "shapes", "held_out": "gone.jsonl"}}, *sets, evaluated=("geneval",)
  )
  (problem,) = report.problems
  assert problem.startswith("eval.rewards.geneval.held_out: ") and "gone.jsonl" in problem


@pytest.mark.parametrize("share, allowed", [(1.0, True), (0.5, False)])
def test_prompts_without_quotes_are_counted(tmp_path, monkeypatch, share, allowed):
  monkeypatch.setattr(ocr, "rapidocr_reader", lambda: lambda image: ())
  file = written(tmp_path, "p.txt", ["a shop", 'a sign "Sale"', "a fox"])
  sets = [f"data.prompts={file}", f"data.held_out={TINY / 'prompts'}"]
  report = check({"ocr": {"max_failed": share}}, *sets)
  sentences = report.warnings if allowed else report.problems
  assert any("cannot score 2 of the 3 prompts" in s for s in sentences), report
  assert any("116 of the 116 prompts" in s for s in report.problems)


def test_local_models_of_pytorch_are_judged_unloaded(tmp_path):
  pytest.importorskip("torch")
  folder = shutil.copytree(TINY / "clip", tmp_path / "model")
  options = {"detector": "mask2former", "directory": str(folder), "clip": str(folder)}
  assert not check({"geneval": options}).problems
  (problem,) = check({"geneval": options | {"device": "cuda"}}).problems
  assert "rewards.geneval.device is 'cuda', which PyTorch does not have here" in problem
  (problem,) = check({"geneval": options | {"device": "abacus"}}).problems
  assert problem.startswith("rewards.geneval.device is 'abacus': ")
  (folder / "model.safetensors").unlink()
  (problem,) = check({"geneval": options}).problems
  assert problem.endswith("which holds no weights.")
