import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from rtdmd_jax.config import load_config
from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime.metrics import MetricWriter, read_metrics
from rtdmd_jax.runtime.wandb_log import WandbRun
from tests.support.paths import CONFIGS

CONFIG = CONFIGS / "tiny_stage2.py"


@pytest.fixture
def wandb(monkeypatch):
  """A module that writes down what it is called with."""
  module = ModuleType("wandb")
  module.started, module.logged, module.defined, module.finished = [], [], [], []
  run = SimpleNamespace(
    log=module.logged.append,
    define_metric=lambda name, **options: module.defined.append((name, options)),
    finish=lambda: module.finished.append(True),
  )
  module.init = lambda **options: module.started.append(options) or run
  module.Image = lambda array: ("image", array.shape)
  module.Error = type("Error", (Exception,), {})
  monkeypatch.setitem(sys.modules, "wandb", module)
  return module


def test_the_same_names_and_steps_as_in_the_metrics_file(tmp_path, wandb):
  run = WandbRun(tmp_path, project="p", config={"seed": 1})
  with MetricWriter(tmp_path, resume_step=-1, mirror=run) as writer:
    writer.scalars(3, {"loss/policy": np.float32(0.5), "reward/ocr": 2})
    writer.image(3, "preview", np.zeros((4, 6, 3), np.uint8))
    writer.warning(3, "reward ocr failed")
    assert not wandb.finished
  assert wandb.logged == [
    {"step": 3, "loss/policy": 0.5, "reward/ocr": 2.0},
    {"step": 3, "preview": ("image", (4, 6, 3))},
    {"step": 3, "warning": "reward ocr failed"},
  ]
  line, warning = read_metrics(tmp_path / "metrics.jsonl")
  assert warning["warning"] == "reward ocr failed"
  assert line["scalars"].keys() == wandb.logged[0].keys() - {"step"}
  assert ("*", {"step_metric": "step"}) in wandb.defined and wandb.finished == [True]


def test_a_resumed_run_is_the_same_run(tmp_path, wandb):
  for _ in range(2):
    WandbRun(tmp_path / ".", project="p", config={"seed": 1}).close()
  other = tmp_path / "other"
  other.mkdir()
  WandbRun(other, project="p", config={}).close()
  one, two, three = wandb.started
  assert one == two and one["id"] != three["id"]
  assert (one["name"], one["project"], one["resume"]) == (tmp_path.name, "p", "allow")
  assert one["config"] == {"seed": 1} and three["name"] == "other"


def test_mistakes_are_one_sentence(tmp_path, wandb, monkeypatch):
  def fails(**options):
    raise wandb.Error("no API key configured")

  wandb.init = fails
  with pytest.raises(UserError, match="no API key configured.*WANDB_MODE=offline"):
    WandbRun(tmp_path, project="p", config={})
  assert not (tmp_path / "wandb_id.txt").exists()
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match=r"log\.wandb needs wandb .*pip install -e \".*\[wandb\]\""):
    WandbRun(tmp_path, project="p", config={})


def test_it_is_off_where_it_ships():
  assert load_config(str(CONFIG)).log.to_dict() == {"wandb": False, "wandb_project": "rtdmd_jax"}
