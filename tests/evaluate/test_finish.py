"""The end of a run on the shipped tiny pipeline: nothing is lost, nothing is done twice."""

import json
import os
import shutil
import stat

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from rtdmd_jax import cli, export, main, sample, train
from rtdmd_jax.adapters.peft import read_notes
from rtdmd_jax.config import load_config
from rtdmd_jax.errors import EXIT_INTERRUPTED, UserError
from rtdmd_jax.evaluate import finish, suite
from rtdmd_jax.evaluate.finish import facts_of, final_scores, is_finished
from rtdmd_jax.runtime.lock import WorkdirLock
from tests.support.paths import CONFIGS
from tests.support.tiny_run import SMALL, expect_mistake, run, tiny_pipeline

ADAPTERS = "adapter_model.safetensors"


def test_final_scores_are_named_by_system_and_reward():
  systems = [
    {"name": "result, few steps", "scores": {"a": {"mean": 0.5}, "b:make": {"mean": None}}},
    {"name": "teacher", "scores": {}},
  ]
  found = final_scores({"systems": systems})
  assert list(found) == ["final/result_few_steps/a", "final/result_few_steps/b:make"]
  np.testing.assert_array_equal(list(found.values()), [0.5, np.nan])


def test_a_run_is_finished_when_this_step_is_exported_and_scored(tmp_path):
  settings = json.loads(load_config(str(CONFIGS / "tiny_stage1.py")).to_json_best_effort())
  facts = facts_of(4, settings, {"data.prompts": "aa"}, {"data.held_out": [0, 9]})
  table = {"systems": [], "run": facts}
  (tmp_path / "evaluation.json").write_text(json.dumps(table))
  assert not is_finished(tmp_path, facts)  # no export
  export.save_peft(
    tmp_path / "export/generator", {}, None, rank=1, alpha=1.0, targets=[], notes={"step": "4"}
  )
  assert is_finished(tmp_path, facts)
  settings["train"]["log_every"] = 77
  assert is_finished(tmp_path, facts_of(4, settings, {"data.prompts": "aa"}, facts["overlap"]))
  for other in (
    facts | {"step": 5},
    facts_of(4, settings, {"data.prompts": "bb"}, facts["overlap"]),
    facts_of(4, settings | {"eval": {}}, {"data.prompts": "aa"}, facts["overlap"]),
  ):
    assert not is_finished(tmp_path, other)
  (tmp_path / "evaluation.json").write_text('{"systems"')
  assert not is_finished(tmp_path, facts)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A stage-1 run of two steps with a checkpoint after each, on a pipeline of its own."""
  root = tmp_path_factory.mktemp("finished")
  pipeline = shutil.copytree(tiny_pipeline(), root / "pipeline")
  options = [
    *SMALL,
    "--config.train.steps=2",
    "--config.train.save_every=1",
    "--config.train.fake_update_ratio=1",
    f"--config.model.pretrained={pipeline}",
    *(f"--config.data.{key}={pipeline / 'prompts'}" for key in ("prompts", "held_out")),
  ]
  exported = []

  def keep(config, setup, state, directory):
    export.export_adapters(config, setup, state, directory)
    exported.append(read_notes(directory / "generator"))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, "export_adapters", keep)
    assert run(root / "run", *options, config="tiny_stage1.py") == 0
  assert exported == [{"format": "pt", "step": "1", "weights": "moving average"}]
  return root, options


@pytest.fixture
def copied(finished, tmp_path):
  """The run's workdir, pipeline and options, for a test to spoil."""
  root, options = finished
  work = shutil.copytree(root / "run", tmp_path / "run")
  return work, root / "pipeline", options


def start(work, options, *more):
  return run(work, *options, *more, config="tiny_stage1.py")


def refuse(*_, **__):
  raise UserError("not again")


@pytest.mark.slow
def test_what_a_run_leaves(finished):
  work = finished[0] / "run"
  notes = {"format": "pt", "step": "2", "weights": "moving average"}
  assert read_notes(work / "export/generator") == notes
  assert read_notes(work / "export/fake_score") == notes | {"weights": "adapters in training"}
  card = (work / "export/generator/README.md").read_text()
  assert "| training steps | 2 |" in card and "| result, few steps | 4 |" in card
  assert "None of the 116 prompts of data.held_out is trained on in this stage." in card
  table = json.loads((work / "evaluation.json").read_text())
  assert table["run"]["step"] == 2 and table["run"]["overlap"] == {"data.held_out": [0, 116]}
  last = json.loads((work / "metrics.jsonl").read_text().splitlines()[-1])
  result = table["systems"][-1]["scores"]["clipscore"]["mean"]
  assert last["step"] == 2 and last["scalars"]["final/result_few_steps/clipscore"] == result
  events = b"".join(p.read_bytes() for p in (work / "tensorboard").iterdir())
  assert b"final/teacher/clipscore" in events
  report = (work / "report.html").read_text()
  assert "None of the 116 prompts" in report and "final/" not in report
  mask = os.umask(0)
  os.umask(mask)
  for path in work.rglob("*"):
    want = (0o777 if path.is_dir() else 0o666) & ~mask
    assert stat.S_IMODE(path.stat().st_mode) == want, path
  assert not list(work.rglob("*.partial")) and not (work / "run.lock").exists()


@pytest.mark.slow
def test_a_finished_run_does_nothing_again(copied, capsys, monkeypatch):
  work, _, options = copied
  monkeypatch.setattr(train, "build", refuse)
  (work / "report.html").unlink()
  assert start(work, options, "--config.train.log_every=5") == 0
  out = capsys.readouterr().out
  assert f"this run is finished: step 2, adapters in {work / 'export'}" in out
  assert (work / "report.html").exists()
  for spoil in ((), ("--config.eval.final_prompts=3",)):
    if not spoil:
      shutil.rmtree(work / "export")
    expect_mistake(capsys, start(work, options, *spoil), "not again")


@pytest.mark.slow
def test_an_interrupted_evaluation_loses_nothing_and_is_made_up_for(copied, capsys, monkeypatch):
  work, _, options = copied
  wanted = (work / "evaluation.json").read_text()
  adapters = (work / "export/generator" / ADAPTERS).read_bytes()
  shutil.rmtree(work / "export")
  (work / "evaluation.json").write_text(wanted[:20])

  def interrupted(*_):
    assert (work / "export/generator" / ADAPTERS).read_bytes() == adapters
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(finish, "final_evaluation", interrupted)
    assert start(work, options) == EXIT_INTERRUPTED
  assert (work / "export/fake_score" / ADAPTERS).exists()
  card = (work / "export/generator/README.md").read_text()
  assert "| training steps | 2 |" in card and "## Held-out scores" not in card
  lines = (work / "metrics.jsonl").read_text()
  assert start(work, options) == 0
  assert "step 3" not in capsys.readouterr().out
  assert (work / "evaluation.json").read_text() == wanted
  more = (work / "metrics.jsonl").read_text().removeprefix(lines).splitlines()
  assert [all(n.startswith("final/") for n in json.loads(m)["scalars"]) for m in more] == [True]
  assert "## Held-out scores" in (work / "export/generator/README.md").read_text()


@pytest.mark.slow
def test_a_checkpoint_stands_in_for_the_export(finished, tmp_path, capsys):
  root, _ = finished
  for role in ("generator", "fake_score"):
    argv = ["export", f"--checkpoint={root / 'run'}", "--format=peft", f"--role={role}"]
    argv.append(f"--out={tmp_path / role}")
    assert cli.run(export.main, argv, define_flags=export.define_flags) == 0
    own, given = (load_file(f / ADAPTERS) for f in (tmp_path / role, root / "run/export" / role))
    assert own.keys() == given.keys()
    for key in own:
      np.testing.assert_allclose(own[key], given[key], rtol=1e-6, err_msg=key)
  card = (tmp_path / "generator/README.md").read_text()
  assert "## Held-out scores" in card and "# LoRA for pipeline" in card
  pixels = []
  work = root / "run"
  for flag in (f"--checkpoint={work}:2", f"--lora={work / 'export/generator'}", "--lora="):
    out = tmp_path / str(len(pixels))
    argv = ["sample", f"--config={CONFIGS / 'tiny_infer.py'}", f"--workdir={out}", flag]
    argv += ["--prompt=a photo of a red circle", "--config.batch=1"]
    assert cli.run(sample.main, argv, define_flags=sample.define_flags) == 0
    pixels.append(np.asarray(Image.open(out / "00000_42.png")).astype(int))
    if len(pixels) == 1:
      assert "checkpoints/2: moving average" in capsys.readouterr().out
      notes = sample.read_notes(out / "00000_42.png")
      assert notes["loras"] == [{"path": str(root / "run/checkpoints/2"), "scale": 1.0}]
      assert notes["pipeline"] == str(root / "pipeline")
  assert np.abs(pixels[0] - pixels[1]).max() <= 1 and np.abs(pixels[0] - pixels[2]).max() > 1
  argv = ["evaluate", f"--config={CONFIGS / 'tiny_eval.py'}", f"--workdir={tmp_path / 'eval'}"]
  argv += ["--config.limit=2", "--config.batch=2", f"--checkpoint={root / 'run'}:1"]
  argv += [f"--config.systems.{name}.steps=1" for name in ("teacher", "base", "cold_start")]
  assert cli.run(suite.main, argv, define_flags=suite.define_flags) == 0
  systems = json.loads((tmp_path / "eval/summary.json").read_text())["systems"]
  assert [s["name"] for s in systems] == ["teacher", "base", "cold_start", "checkpoint_1"]
  assert systems[-1]["steps"] == 4 and systems[-1]["guidance"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, key",
  [
    ("prompts/train_metadata.jsonl", "data.prompts"),
    ("prompts/test_metadata.jsonl", "data.held_out"),
    ("tokenizer_2/tokenizer.json", "model.pretrained, tokenizer_2"),
    ("vae/diffusion_pytorch_model.safetensors", "model.pretrained, vae"),
    ("text_encoder/model.safetensors", "model.pretrained, text_encoder"),
    ("scheduler/scheduler_config.json", "model.pretrained, scheduler"),
  ],
)
def test_another_content_under_the_same_path_is_refused(copied, capsys, monkeypatch, name, key):
  work, pipeline, options = copied
  monkeypatch.setattr(train, "build", refuse)  # it is seen before anything is loaded
  file = pipeline / name
  before = file.read_bytes()
  line = before.splitlines(keepends=True)[-1]
  file.write_bytes(before + line if name.endswith("jsonl") else before[:-1] + b" ")
  try:
    message = f"the content of {key} has changed under the same path"
    expect_mistake(capsys, start(work, options, "--config.train.steps=3"), message)
    argv = ["main", f"--config={CONFIGS / 'tiny_stage1.py'}", f"--workdir={work}", *options]
    argv += ["--config.train.steps=3", "--allow_config_change"]
    assert cli.run(main.main, argv, define_flags=main.define_flags) == 2
    seen = capsys.readouterr()
    assert f"changed since the last start: the content of {key}" in seen.out
    assert "not again" in seen.err
  finally:
    file.write_bytes(before)


@pytest.mark.slow
def test_two_runs_in_one_workdir(copied, capsys):
  work, _, options = copied
  with WorkdirLock(work):
    expect_mistake(capsys, start(work, options), "another run is using", str(os.getpid()))
  assert start(work, options) == 0


@pytest.mark.slow
def test_stage_1_without_rewards_ends_well(tmp_path, capsys):
  config = tmp_path / "plain.py"
  config.write_text(
    f"import sys\nsys.path.insert(0, {str(CONFIGS)!r})\nimport tiny_stage1\n"
    "def get_config():\n  c = tiny_stage1.get_config()\n"
    "  for name in list(c.rewards):\n    del c.rewards[name]\n  return c\n"
  )
  options = [*SMALL, "--config.train.steps=1", "--config.train.fake_update_ratio=1"]
  assert run(tmp_path / "run", *options, config=config) == 0
  assert "report:" in capsys.readouterr().out
  card = (tmp_path / "run/export/generator/README.md").read_text()
  assert "| stage | stage1 |" in card and "## Held-out scores" not in card
  report = (tmp_path / "run/report.html").read_text()
  assert "no reward scored them" in report and "teacher" in report
