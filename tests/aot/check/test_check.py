"""`main --check` on the shipped tiny pipeline."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rtdmd_jax import cli, main
from rtdmd_jax.aot.check import Report, check, files, hardware, networks, programs, show
from rtdmd_jax.aot.check import run as whole
from rtdmd_jax.config import load_config
from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime import sharding
from rtdmd_jax.runtime.chips import CHIPS
from rtdmd_jax.weights import safetensors
from tests.support.paths import CONFIGS


def run(*overrides, config="tiny_stage2.py"):
  argv = ["main", "--check", f"--config={CONFIGS / config}", *overrides]
  try:
    return cli.run(main.main, argv, define_flags=main.define_flags, requires=("config",))
  except SystemExit as stopped:
    return stopped.code


def load(*overrides, config="tiny_stage2.py"):
  return load_config(str(CONFIGS / config), overrides)


def tiny():
  return Path(load().model.pretrained)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["tiny_stage1.py", "tiny_stage2.py"])
def test_a_sound_run_is_described_without_reading_weights(tmp_path, capsys, monkeypatch, config):
  def read(*args):
    raise AssertionError("weights must not be read")

  monkeypatch.setattr(safetensors, "_read_leaf", read)
  assert run(f"--workdir={tmp_path / 'new'}", config=config) == 0
  out, err = capsys.readouterr()
  assert err == "" and not (tmp_path / "new").exists()
  parts = ("devices: ", "a new run", "344 to train on", "optimizers", "TFLOP a step")
  for part in (*parts, "encoded prompts: 0.01 MB each"):
    assert part in out
  propagated = " (back-propagated)" if "stage2" in config else ""
  assert f"clipscore x 1{propagated}, geneval x 1" in out
  assert f"would run: {config.removeprefix('tiny_').removesuffix('.py')}, " in out
  assert out.splitlines()[-1] == "no problem found" and out.count("\n") < 30


@pytest.mark.slow
def test_checked_numbers_are_no_obstacle(capsys):
  assert run("--config.train.check_numbers=true", config="tiny_stage1.py") == 0
  assert capsys.readouterr().out.endswith("no problem found\n")


@pytest.mark.slow
def test_every_problem_is_a_line_and_the_last_counts_them():
  arguments = [
    "--config.data.prompts=no_prompts.txt",
    "--config.data.held_out=no_held_out",
    "--config.load.generator=no_stage1",
    "--config.rewards.clipscore.directory=no_clip",
    "--config.rewards.geneval.detector=circles",
    "--config.mesh.data=3",
    "--config.dmd.boundary_index=3",
  ]
  command = [sys.executable, "-m", "rtdmd_jax.main", "--check"]
  done = subprocess.run(
    [*command, f"--config={CONFIGS / 'tiny_stage2.py'}", *arguments],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    cwd=CONFIGS.parent,
  )
  lines = done.stdout.splitlines()
  assert done.returncode == 2 and lines[-1] == "6 problems" and "Traceback" not in done.stdout
  words = ("no_prompts", "no_held_out", "no_clip", "circles", "no_stage1", "mesh")
  for problem, word in zip(lines[-7:-1], words, strict=True):
    assert problem.startswith("error: ") and word in problem
  assert lines[-8].startswith("warning: dmd.boundary_index=3 has no effect")
  assert any("would run: stage2, 30 steps of 96 images" in line for line in lines[:-8])


def test_warnings_are_no_problems(capsys):
  report = Report(["a line"], [], ["careful"])
  assert show(report) == 0
  assert capsys.readouterr() == ("a line\nno problem found\n", "warning: careful\n")
  report.problem("one")
  report.problem("one")
  assert show(report) == 2 and capsys.readouterr().out.endswith("\n1 problem\n")


@pytest.mark.parametrize(
  "config, tool", [("tiny_infer.py", "sample"), ("tiny_eval.py", "evaluate")]
)
def test_the_configuration_of_another_tool(tmp_path, capsys, config, tool):
  sentence = f"python -m rtdmd_jax.{tool}"
  assert run(config=config) == 2 and sentence in capsys.readouterr().err
  argv = ["main", f"--config={CONFIGS / config}", f"--workdir={tmp_path}"]
  assert cli.run(main.main, argv, define_flags=main.define_flags, requires=("config",)) == 2
  assert sentence in capsys.readouterr().err


def problems_of(part, config, *args):
  report = Report()
  part(report, config, *args)
  return report.problems


@pytest.mark.slow
def test_a_broken_pipeline(tmp_path):
  pipeline = shutil.copytree(tiny(), tmp_path / "pipeline")
  file = pipeline / "transformer/diffusion_pytorch_model.safetensors"
  tensors = load_file(file)
  tensors["proj_out.bias"] = np.zeros(3, np.float32)
  save_file(tensors, file)
  (pipeline / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"cut")
  shutil.rmtree(pipeline / "tokenizer_3")
  shutil.rmtree(pipeline / "text_encoder_2")
  shutil.rmtree(pipeline / "scheduler")
  found = problems_of(networks.check_networks, load(f"model.pretrained={pipeline}"))
  words = ("proj_out.bias has shape (3,)", "vae", "tokenizer_3", "text_encoder_2", "scheduler")
  assert len(found) == len(words)
  for word in words:
    assert sum(word in problem for problem in found) == 1, found


def test_roles_and_adapters_of_earlier_stages(tmp_path):
  other = shutil.copytree(tiny() / "transformer", tmp_path / "other")
  settings = json.loads((other / "config.json").read_text())
  (other / "config.json").write_text(json.dumps(settings | {"num_layers": 2}))
  adapter = shutil.copytree(tiny() / "stage1/generator", tmp_path / "adapter")
  for file in adapter.glob("*.safetensors"):
    file.write_bytes(b"cut")
  foreign = tmp_path / "foreign.safetensors"
  save_file({"transformer.blocks.0.lora_A.weight": np.zeros((2, 2), np.float32)}, foreign)
  config = load(
    f"model.teacher_init={other}",
    "model.fake_score_init=nowhere",
    f"load.generator={adapter}",
    f"load.fake_score={foreign}:0.5",
  )
  found = problems_of(networks.check_networks, config)
  words = ("nowhere", "another network", "load.generator: ", "load.fake_score: ")
  assert len(found) == 4
  for problem, word in zip(found, words, strict=True):
    assert word in problem, found


@pytest.mark.parametrize(
  "overrides, message",
  [
    (["stage=stage3"], "stage is 'stage3'"),
    (["dmd.eta=0", "policy.advantage_limit=-5"], "policy.advantage_limit is -5.0"),
    (["model.dtype=int8"], "model.dtype is 'int8'; it must be one of"),
    (["model.pretrained=nowhere"], "model.pretrained is nowhere, which does not exist"),
  ],
)
def test_values_and_files_are_judged_together(overrides, message):
  report = check(load(*overrides, "data.held_out=gone"))
  text = "\n".join(report.problems)
  assert message in text
  assert ("gone" in text) == (overrides != ["stage=stage3"])
  assert ("dmd.eta is 0" in text) == (overrides[0] == "dmd.eta=0")


def test_a_missing_platform_is_a_sentence(monkeypatch):
  def devices():
    raise RuntimeError("Unable to initialize backend 'tpu': not found\nmore")

  monkeypatch.setattr(jax, "devices", devices)
  (problem,) = check(load()).problems
  assert problem.startswith("jax has no device (Unable to initialize backend 'tpu': not found)")


def test_few_prompts_and_empty_names(tmp_path):
  config = load("batch.prompts=1000")
  report = Report()
  prompts = files.read_prompts(report, config)
  with pytest.raises(UserError, match="batch.prompts is 1000, but .* has 344 prompts"):
    whole._enough(config, prompts.train)
  found = problems_of(files.read_prompts, load("data.prompts=", "data.held_out="))
  assert found == [
    "data.prompts is empty; name a file or folder of prompts.",
    "data.held_out is empty; name a file or folder of prompts.",
  ]


@pytest.mark.slow
def test_missing_rewards_and_backbones_have_their_published_size(capsys):
  assert run("--config.rewards.hpsv2.directory=elsewhere", config="sd35_stage2.py") == 2
  out = capsys.readouterr().out
  for row in (
    r"reward hpsv2 +986,109,441 +3\.944",
    r"base stable-diffusion-3.5-medium +2,469,663,936 +4\.939",
    r"reward imagereward, evaluated +\d{3},\d{3},\d{3} ",
  ):
    assert re.search(row, out), out
  *parts, total = map(float, re.findall(r"^  .* (\d+\.\d{3})$", out, re.M))
  assert total == pytest.approx(sum(parts), abs=0.01) and total > 21.7


def test_hours_of_a_known_device(monkeypatch):
  config = load(config="sd35_stage1.py")
  costs = {"fake_score": 3e12, "generator": 20e12, "finish": 0.0}
  assert "the hours are not known, as the peak rate of 'cpu'" in hardware.time(config, costs)
  monkeypatch.setattr(hardware, "peak_tflops", lambda: 8 * CHIPS["TPU v5 lite"].flops / 1e12)
  # (3 + 20 / 10) TFLOP a step, 15,000 steps, 8 x 197 TFLOP/s.
  assert "5 TFLOP a step; 0.0 hours for 15,000 steps at 40% of" in hardware.time(config, costs)
  many = {name: cost * 100 for name, cost in costs.items()}
  hours = 500 * 15_000 / (8 * 197 * 0.4) / 3600
  assert f"500 TFLOP a step; {hours:.1f} hours" in hardware.time(config, many)


def test_what_is_too_large_for_a_device(monkeypatch):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  trees = {"base net": {"kernel": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}}
  report = Report()
  monkeypatch.setattr(hardware, "device_memory", lambda: 1e6)
  hardware.memory(report, trees, mesh)
  assert not report.problems and "it cannot train this" in report.warnings[0]
  monkeypatch.setattr(hardware, "_is_cpu", lambda: False)
  hardware.memory(report, trees, mesh)
  assert report.problems[0].startswith("0.00 GB must stay on every device, which has 0.00 GB")


def test_heads_divide_over_the_mesh(monkeypatch):
  net = SimpleNamespace(config=SimpleNamespace(num_attention_heads=4))
  setup = SimpleNamespace(pipeline=SimpleNamespace(transformer=net))
  shape = {"data": 2, "fsdp": 3, "tensor": 2}
  monkeypatch.setattr(sharding, "current", lambda: SimpleNamespace(shape=shape))
  programs._heads_divide(setup)
  shape["tensor"] = 3
  with pytest.raises(UserError, match="does not divide the transformer's 4 attention heads"):
    programs._heads_divide(setup)


def test_workdirs(tmp_path):
  config = load()
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="is not a directory that can be written"):
    files.check_workdir(config, tmp_path / "file/run", False)
  (tmp_path / "checkpoints/20").mkdir(parents=True)
  settings = json.loads(config.to_json_best_effort())
  (tmp_path / "config.json").write_text(json.dumps(settings))
  (line,) = files.check_workdir(config, tmp_path, False)
  assert line.endswith("goes on after step 20")
  settings["seed"] = 7
  (tmp_path / "config.json").write_text(json.dumps(settings))
  with pytest.raises(UserError, match="seed: 7 -> 42"):
    files.check_workdir(config, tmp_path, False)
  assert "  changed: seed: 7 -> 42" in files.check_workdir(config, tmp_path, True)


def test_training_needs_a_workdir(capsys):
  argv = ["main", f"--config={CONFIGS / 'tiny_stage2.py'}"]
  assert cli.run(main.main, argv, define_flags=main.define_flags, requires=("config",)) == 2
  assert "--workdir is required: Folder of the run" in capsys.readouterr().err
