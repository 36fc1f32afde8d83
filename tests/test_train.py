"""The entry point on the shipped tiny pipeline: bad input, resume, recompilation, transfers."""

import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from rtdmd_jax import errors
from rtdmd_jax.config import load_config
from rtdmd_jax.report.scores import score_text
from rtdmd_jax.weights.safetensors import read_config
from tests.support.paths import CONFIGS, ROOT
from tests.support.tiny_run import SMALL, expect_mistake, run, tiny_pipeline


@pytest.fixture
def pipeline(tmp_path):
  """A copy of the shipped pipeline that a test may break."""
  return shutil.copytree(tiny_pipeline(), tmp_path / "pipeline")


def test_a_missing_pipeline_directory(tmp_path, capsys):
  code = run(tmp_path, "--config.model.pretrained=nowhere")
  expect_mistake(capsys, code, "nowhere")


def test_an_unknown_config_key(tmp_path, capsys):
  code = run(tmp_path, "--config.dmd.etta=0.5")
  expect_mistake(capsys, code, "etta", "eta")


def test_a_broken_prompt_line(tmp_path, capsys):
  prompts = tmp_path / "prompts.jsonl"
  prompts.write_text('{"prompt": "a photo of a circle"}\n{"prompt": \n')
  code = run(tmp_path / "run", f"--config.data.prompts={prompts}")
  expect_mistake(capsys, code, "prompts.jsonl", "2")


def test_a_checkpoint_with_a_missing_tensor(tmp_path, pipeline, capsys):
  _rewrite(pipeline / "transformer/diffusion_pytorch_model.safetensors", drop="proj_out.bias")
  code = run(tmp_path / "run", f"--config.model.pretrained={pipeline}")
  expect_mistake(capsys, code, "proj_out.bias")


def test_a_checkpoint_with_a_misshaped_tensor(tmp_path, pipeline, capsys):
  _rewrite(pipeline / "transformer/diffusion_pytorch_model.safetensors", cut="proj_out.bias")
  code = run(tmp_path / "run", f"--config.model.pretrained={pipeline}")
  expect_mistake(capsys, code, "proj_out.bias", "shape")


@pytest.mark.slow
def test_micro_batches_that_do_not_divide(tmp_path, capsys):
  """A run ends with one sentence when its batch cannot be cut."""
  code = run(tmp_path, *SMALL, "--config.batch.micro_batches=3")
  expect_mistake(capsys, code, "micro_batches", "4")


@pytest.mark.slow
def test_a_decode_chunk_that_does_not_divide(tmp_path, capsys):
  """A run ends with one sentence when a micro-batch cannot be cut for decoding."""
  for chunk, words in ((3, "4 images"), (-1, "a whole number from 0")):
    code = run(tmp_path, *SMALL, f"--config.batch.decode_chunk={chunk}")
    expect_mistake(capsys, code, "batch.decode_chunk", words)


def _rewrite(file, drop=None, cut=None):
  from safetensors.numpy import load_file, save_file

  tensors = load_file(file)
  if drop:
    del tensors[drop]
  if cut:
    tensors[cut] = np.ascontiguousarray(tensors[cut][:-1])
  save_file(tensors, file)


@pytest.mark.parametrize(
  ("mean", "ci95", "text"),
  [(0.5, 0.25, "0.5000 ± 0.2500"), (0.5, None, "0.5000"), (None, None, "failed")],
)
def test_a_score_is_shown_as_far_as_it_exists(mean, ci95, text):
  assert score_text({"mean": mean, "ci95": ci95, "n": 1}) == text


@pytest.mark.slow
def test_offloaded_bases_change_nothing_but_where_they_lie(tmp_path):
  scalars = []
  for offload in ("false", "true"):
    options = [
      *SMALL,
      "--config.train.steps=2",
      "--config.train.fake_update_ratio=1",
      "--config.model.remat=full",
      f"--config.model.offload={offload}",
    ]
    assert run(tmp_path / offload, *options, config="tiny_stage1.py") == 0
    lines = map(json.loads, (tmp_path / offload / "metrics.jsonl").read_text().splitlines())
    found = [line["scalars"] for line in lines if "generator/grad_norm" in line.get("scalars", {})]
    scalars.append([{k: v for k, v in f.items() if "loss" in k or "grad" in k} for f in found])
  assert len(scalars[0]) == 2 and all(step["generator/grad_norm"] > 0 for step in scalars[0])
  for device, host in zip(*scalars, strict=True):
    assert host == pytest.approx(device, rel=1e-5)  # two programs, which may round differently


@pytest.mark.parametrize("key, value", [("remat", "none"), ("base_storage", "int8")])
def test_offloading_is_refused_where_it_saves_nothing(tmp_path, capsys, key, value):
  options = ["--config.model.remat=full", f"--config.model.{key}={value}"]
  code = run(tmp_path, *SMALL, "--config.model.offload=true", *options)
  expect_mistake(capsys, code, "model.offload", f"model.{key}")


@pytest.mark.slow
def test_without_distribution_matching_the_fake_score_rests(tmp_path):
  options = ["--config.train.steps=2", "--config.policy.dmd_weight=0.0"]
  assert run(tmp_path, *SMALL, *options) == 0
  lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
  steps = [line["scalars"] for line in lines if "generator/grad_norm" in line.get("scalars", {})]
  assert len(steps) == 2 and all(step["generator/grad_norm"] > 0 for step in steps)
  assert not any(name.startswith("fake_score/grad") for step in steps for name in step)


@pytest.mark.slow
def test_a_run_over_int8_bases_ends_and_resumes_as_such(tmp_path, capsys):
  small = [*SMALL, "--config.train.steps=2", "--config.train.fake_update_ratio=1"]
  int8 = [*small, "--config.model.base_storage=int8"]
  assert run(tmp_path, *int8, config="tiny_stage1.py") == 0
  lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
  steps = [line for line in lines if "generator/grad_norm" in line.get("scalars", {})]
  assert [line["step"] for line in steps] == [1, 2]
  assert all(line["scalars"]["generator/grad_norm"] > 0 for line in steps)
  assert (tmp_path / "export/generator/adapter_model.safetensors").is_file()
  capsys.readouterr()
  code = run(tmp_path, *small, config="tiny_stage1.py")
  expect_mistake(capsys, code, 'model.base_storage: "int8" -> "native"')


@pytest.mark.slow
def test_adapters_in_bfloat16_resume_and_are_exported(tmp_path):
  half = [*SMALL, "--config.lora.dtype=bfloat16", "--config.train.fake_update_ratio=1"]
  for steps in (1, 2):
    assert run(tmp_path, *half, f"--config.train.steps={steps}", config="tiny_stage1.py") == 0
  for name, rounded in (("generator", False), ("fake_score", True)):
    weights = load_file(tmp_path / "export" / name / "adapter_model.safetensors")
    low_bits = np.concatenate([w.view(np.uint32).ravel() & 0xFFFF for w in weights.values()])
    assert any(w.any() for key, w in weights.items() if "lora_B" in key)
    assert rounded != np.any(low_bits)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["tiny_stage1.py", "tiny_stage2.py"])
def test_an_interrupted_run_resumes_bit_for_bit_and_leaves_everything(tmp_path, config):
  overrides = [o for o in SMALL if config == "tiny_stage2.py" or "policy" not in o]
  overrides += ["--config.train.save_every=1", "--config.train.fake_update_ratio=2"]
  overrides += ["--config.eval.every=4"]
  assert run(tmp_path / "whole", *overrides, "--config.train.steps=4", config=config) == 0
  assert run(tmp_path / "parts", *overrides, "--config.train.steps=2", config=config) == 0
  # A first evaluation beside which the next one looks like reward hacking.
  first = {"step": 0, "means": {"eval/clipscore": [-9.0, 0.0], "images/diversity": [9.0, 0.0]}}
  (tmp_path / "parts/monitor.json").write_text(json.dumps(first))
  assert run(tmp_path / "parts", *overrides, "--config.train.steps=4", config=config) == 0
  for name in ("generator", "fake_score"):
    one, two = (
      (tmp_path / run / "export" / name / "adapter_model.safetensors").read_bytes()
      for run in ("whole", "parts")
    )
    assert one == two
  work = tmp_path / "parts"
  steps = [json.loads(line)["step"] for line in (work / "metrics.jsonl").read_text().splitlines()]
  assert sorted(set(steps)) == [0, 1, 2, 3, 4]
  first = json.loads((work / "metrics.jsonl").read_text().partition("\n")[0])["scalars"]
  assert {"eval/geneval", "images/dark_share", "images/diversity"} <= first.keys()
  lines = map(json.loads, (work / "metrics.jsonl").read_text().splitlines())
  said = [line["warning"] for line in lines if "warning" in line]
  assert said and "images/diversity fell from 9 to" in said[0], said
  report = (work / "report.html").read_text()
  assert "teacher" in report and "<svg" in report and "reward hacking?" in report
  systems = json.loads((work / "evaluation.json").read_text())["systems"]
  assert {"clipscore", "geneval"} <= systems[-1]["scores"].keys()
  assert list((work / "previews").glob("*.png"))
  events = b"".join(p.read_bytes() for p in (work / "tensorboard").iterdir())
  assert b"preview" in events and b"| lora.rank | `" in events and b"versions" in events
  assert read_config(work / "export/generator", "adapter_config.json")["peft_type"] == "LORA"


@pytest.mark.slow
def test_numbers_that_are_not_finite_end_the_run(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr("rtdmd_jax.train.check_limits", lambda config: None)
  overrides = [*SMALL, "--config.policy.policy_weight=nan", "--config.train.max_skipped=2"]
  assert run(tmp_path, *overrides, "--config.train.steps=5") == errors.EXIT_NUMBERS
  seen = capsys.readouterr()
  assert "step 1: the update of generator was skipped" in seen.out
  assert seen.err.startswith("stopped: at step 2 the last 2 updates of generator")
  assert "gradients of " in seen.err and ".attn.add_" in seen.err and " more" in seen.err
  assert seen.err.count("\n") == 1


# A weight that is no number is refused; let through, it is a fault of the kind that is looked for.
_UNLIMITED = """
import sys
from rtdmd_jax import cli, main, train
train.check_limits = lambda config: None
sys.exit(cli.run(main.main, sys.argv, define_flags=main.define_flags))
"""


@pytest.mark.slow
def test_debug_mode_names_the_line_of_the_first_nan(tmp_path):
  """Programs in which all is well pass first: the rollout's and the fake score's."""
  argv = [f"--config={CONFIGS / 'tiny_stage2.py'}", f"--workdir={tmp_path}", *SMALL]
  argv += ["--config.train.check_numbers=True", "--config.train.steps=1"]
  argv.append("--config.policy.policy_weight=nan")
  # The emitter of other tests takes three times as long for a program of this size.
  environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
  done = subprocess.run(
    [sys.executable, "-c", _UNLIMITED, *argv], env=environment, capture_output=True, text=True
  )
  assert done.returncode == errors.EXIT_NUMBERS, done.stderr
  assert done.stderr.startswith("stopped: train.check_numbers: nan generated by primitive")
  assert "hybrid_loss.py" in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
  command = [sys.executable, "-m", "rtdmd_jax.main", f"--config={CONFIGS / 'tiny_stage2.py'}"]
  command += [*SMALL, "--config.train.steps=4", f"--workdir={tmp_path / 'parts'}"]
  environment = os.environ | {"PYTHONPATH": str(CONFIGS.parent)}
  process = subprocess.Popen(
    command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  line = ""
  while not line.startswith("step 1/"):
    line = process.stdout.readline()
    assert line, process.stderr.read()
  process.send_signal(signal.SIGTERM)
  _, said = process.communicate(timeout=200)
  assert process.returncode == errors.EXIT_PREEMPTED, said
  assert "the same command goes on from it" in said
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
  assert "resuming after step" in done.stdout
  assert run(tmp_path / "whole", *SMALL, "--config.train.steps=4") == 0
  one, two = (
    (tmp_path / run / "export/generator/adapter_model.safetensors").read_bytes()
    for run in ("whole", "parts")
  )
  assert one == two


@pytest.mark.slow
def test_after_the_first_steps_nothing_recompiles_and_nothing_is_transferred_by_accident(tmp_path):
  from rtdmd_jax.training.setup import build
  from rtdmd_jax.training.stages import initial_state, make_step, step_batch

  events = []
  jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.append(event))
  for name in ("tiny_stage1.py", "tiny_stage2.py"):
    config = load_config(
      str(CONFIGS / name), [o.removeprefix("--config.") for o in SMALL if "policy" not in o]
    )
    with config.unlocked():
      config.train.fake_update_ratio = 2
      if config.stage == "stage2":
        config.batch.micro_batches = 2
    setup = build(config)
    state = initial_state(config, setup)
    step = make_step(config, setup)

    def run(number, state, config=config, setup=setup, step=step):
      batch, prompts = step_batch(config, setup, number)
      return step(state, batch, prompts, number)

    for number in range(2):
      state, _ = run(number, state)
    assert [event for event in events if "backend_compile" in event]  # the listener works
    # New prompts are encoded by programs that exist already.
    events.clear()
    with jax.transfer_guard("disallow"):
      for number in range(2, 6):
        state, _ = run(number, state)
    jax.block_until_ready(state)
    assert not [event for event in events if "backend_compile" in event], name
