"""`main --check` on the shipped tiny pipeline."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rtdmd_jax import check, cli, main, sharding
from rtdmd_jax.config import load_config
from rtdmd_jax.errors import UserError
from rtdmd_jax.weights import safetensors

CONFIGS = Path(__file__).parents[1] / "configs"


def run(*overrides, config="tiny_stage2.py"):
  argv = ["main", "--check", f"--config={CONFIGS / config}", *overrides]
  try:
    return cli.run(main.main, argv, define_flags=main.define_flags, requires=("config",))
  except SystemExit as stopped:
    return stopped.code


def tiny():
  return Path(load_config(str(CONFIGS / "tiny_stage2.py")).model.pretrained)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["tiny_stage1.py", "tiny_stage2.py"])
def test_a_sound_run_is_described_without_reading_weights(tmp_path, capsys, monkeypatch, config):
  def read(*args):
    raise AssertionError("weights must not be read")

  monkeypatch.setattr(safetensors, "_read_leaf", read)
  assert run(f"--workdir={tmp_path / 'new'}", config=config) == 0
  out, err = capsys.readouterr()
  assert err == "" and not (tmp_path / "new").exists()
  for part in ("dmd.eta = 0.9", "a new run", "344 to train on", "optimizers", "no problem found"):
    assert part in out
  assert f"would run: {config.removeprefix('tiny_').removesuffix('.py')}, " in out


@pytest.mark.slow
@pytest.mark.parametrize(
  "override, message",
  [
    ("dmd.objective=gan", "dmd.objective is 'gan'"),
    ("dmd.start_mode=now", "cannot be made of this configuration"),
  ],
)
def test_values_that_the_programs_refuse(capsys, override, message):
  assert run(f"--config.{override}") == 2
  assert message in capsys.readouterr().err


def test_every_problem_is_a_line(capsys):
  code = run(
    "--config.data.prompts=no_prompts.txt",
    "--config.load.generator=no_stage1",
    "--config.rewards.clipscore.directory=no_clip",
    "--config.rewards.geneval.detector=circles",
    "--config.mesh.data=3",
  )
  out, err = capsys.readouterr()
  problems = err.splitlines()
  assert code == 2 and len(problems) == 5 and "Traceback" not in err
  words = ("no_prompts", "no_clip", "circles", "no_stage1", "mesh")
  for problem, word in zip(problems, words, strict=True):
    assert problem.startswith("error: ") and word in problem
  assert "would run: stage2, 30 steps of 96 images" in out and "no problem" not in out


def test_a_broken_pipeline(tmp_path, capsys):
  pipeline = shutil.copytree(tiny(), tmp_path / "pipeline")
  file = pipeline / "transformer/diffusion_pytorch_model.safetensors"
  tensors = load_file(file)
  tensors["proj_out.bias"] = np.zeros(3, np.float32)
  save_file(tensors, file)
  (pipeline / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"cut")
  shutil.rmtree(pipeline / "tokenizer_3")
  assert run(f"--config.model.pretrained={pipeline}") == 2
  problems = capsys.readouterr().err.splitlines()
  assert len(problems) == 3
  for word in ("tokenizer_3", "vae", "proj_out.bias has shape (3,)"):
    assert any(word in problem for problem in problems), problems


@pytest.mark.parametrize(
  "overrides, message",
  [
    (["--config.model.pretrained=nowhere"], "model.pretrained is nowhere"),
    (["--config.stage=stage3"], "stage is 'stage3'"),
    (["--config.batch.prompts=1000"], "batch.prompts is 1000"),
    (["--config.model.teacher_init=nowhere"], "model.teacher_init is nowhere"),
    (["--config.policy.range_end=9"], "policy.range_start..range_end is 0..9"),
    (["--config.lora.targets=attn.to_x"], "attn.to_x"),
  ],
)
def test_one_problem(capsys, overrides, message):
  assert run(*overrides) == 2
  err = capsys.readouterr().err
  assert message in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
  "name, options, message",
  [
    ("clipscroe", {}, "did you mean 'clipscore'"),
    ("clipscore", {"directory": str(tiny() / "clip"), "size": 1}, "size"),
    ("ocr", {"url": "http://127.0.0.1:9"}, "cannot be reached"),
    ("ocr", {"backpropagate": True}, "only clipscore"),
    ("nowhere:Reward", {}, "cannot import 'nowhere:Reward'"),
    ("types:SimpleNamespace", {"directory": "gone"}, "directory is gone"),
  ],
)
def test_rewards(name, options, message):
  with pytest.raises(UserError, match=message):
    check._reward(name, {"weight": 1.0, **options})


def test_heads_and_batches_divide_over_the_mesh(monkeypatch):
  config = load_config(str(CONFIGS / "tiny_stage2.py"))
  net = SimpleNamespace(config=SimpleNamespace(num_attention_heads=4))
  setup = SimpleNamespace(pipeline=SimpleNamespace(transformer=net))
  shape = {"data": 2, "fsdp": 3, "tensor": 2}
  monkeypatch.setattr(sharding, "current", lambda: SimpleNamespace(shape=shape))
  monkeypatch.setattr(sharding, "batch_parts", lambda: shape["data"] * shape["fsdp"])
  check._divides(config, setup)
  shape["tensor"] = 3
  with pytest.raises(UserError, match="does not divide the transformer's 4 attention heads"):
    check._divides(config, setup)
  shape["fsdp"] = 5
  with pytest.raises(UserError, match="make it a multiple of 10"):
    check._divides(config, setup)


def test_workdirs(tmp_path):
  config = load_config(str(CONFIGS / "tiny_stage2.py"))
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="no directory that can be written to"):
    check._workdir(config, tmp_path / "file/run", False)
  (tmp_path / "checkpoints/20").mkdir(parents=True)
  settings = json.loads(config.to_json_best_effort())
  (tmp_path / "config.json").write_text(json.dumps(settings))
  (line,) = check._workdir(config, tmp_path, False)
  assert line.endswith("goes on after step 20")
  settings["seed"] = 7
  (tmp_path / "config.json").write_text(json.dumps(settings))
  with pytest.raises(UserError, match="seed: 7 -> 42"):
    check._workdir(config, tmp_path, False)
  assert "  changed: seed: 7 -> 42" in check._workdir(config, tmp_path, True)


def test_training_needs_a_workdir(capsys):
  argv = ["main", f"--config={CONFIGS / 'tiny_stage2.py'}"]
  assert cli.run(main.main, argv, define_flags=main.define_flags, requires=("config",)) == 2
  assert "--workdir is required: Folder of the run" in capsys.readouterr().err
