"""What processes tell each other: alone, and in real processes over this machine's loopback."""

import json
import re
import signal

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from rtdmd_jax import errors
from rtdmd_jax.datasets.prompts import Prompt
from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.multi import MultiReward
from rtdmd_jax.rewards.per_process import score_local_rows, score_shared
from rtdmd_jax.runtime import multihost, sharding
from tests.support.processes import finish, start


def test_a_process_alone_hears_itself():
  value = {"a": [1, None, "ä" * 300], "b": 0.1}
  assert multihost.gather(value) == [value]
  multihost.assert_equal(value)
  agreement = multihost.AsyncMax()
  assert [agreement(n) for n in (0, 15, 0)] == [0, 15, 0]
  assert multihost.is_main()


def test_an_error_passes_through():
  with pytest.raises(UserError, match="^mine$"), multihost.raise_on_all_processes():
    raise UserError("mine")


def test_an_error_of_another_process_ends_this_one(monkeypatch):
  monkeypatch.setattr(multihost, "gather", lambda own: [own, "no such file"])
  with (
    pytest.raises(UserError, match="^process 1: no such file$"),
    multihost.raise_on_all_processes(),
  ):
    pass


def test_what_differs_is_named(monkeypatch):
  others = [{"config": {"seed": 1, "x": 2}}, {"config": {"seed": 2, "x": 2}}]
  monkeypatch.setattr(multihost, "gather", lambda own: [own, *others])
  with pytest.raises(UserError, match="process 2 differs from process 0 in config.seed: 1 -> 2;"):
    multihost.assert_equal(others[0])
  others[:] = [{"config": {"seed": 1}}]
  with pytest.raises(UserError, match="process 1 .* config.x: 2 -> absent"):
    multihost.assert_equal({"config": {"seed": 1, "x": 2}})


def test_the_other_processes_print_nothing(capsys, monkeypatch):
  with multihost.silence_other_processes():
    print("main")
  monkeypatch.setattr(multihost, "is_main", lambda: False)
  with multihost.silence_other_processes():
    print("other")
  assert capsys.readouterr().out == "main\n"


def test_rows_and_scores_of_one_process(monkeypatch):
  images = np.arange(5, dtype=np.uint8).repeat(12).reshape(5, 2, 2, 3)
  prompts = [Prompt(str(i), {"i": i}) for i in range(5)]

  def reward(images, texts, records):
    assert [int(t) for t in texts] == [r["i"] for r in records] == images[:, 0, 0, 0].tolist()
    return np.where(images[:, 0, 0, 0] == 3, np.nan, images[:, 0, 0, 0] / 7)

  rewards = MultiReward({"r": reward}, {"r": 1.0}, {}, {"r": 1.0}, isolate_failures=False)
  want = np.array([0, 1, 2, np.nan, 4], np.float32) / np.float32(7)
  np.testing.assert_allclose(
    score_local_rows(rewards, jax.numpy.asarray(images), prompts)["r"], want
  )
  shared = score_shared(rewards, images, prompts, ["r"])
  np.testing.assert_allclose(shared.values["r"], want)
  assert shared.reasons == {"r": "it gave no score and no reason"}
  rows, held = sharding.local_rows(jax.numpy.asarray(images))
  np.testing.assert_array_equal(rows, np.arange(5))
  np.testing.assert_array_equal(held, images)
  # Two processes take turns; what the other one scores arrives by `gather`.
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  other = [[1, 3], {"r": [1 / 7, float("nan")]}, {"r": "no memory"}]
  monkeypatch.setattr(multihost, "gather", lambda own: [own, None if own is None else other])
  shared = score_shared(rewards, images, prompts, ["r"])
  np.testing.assert_allclose(shared.values["r"], want)
  assert shared.reasons == {"r": "process 1: no memory"}


def test_a_reward_that_fails_in_one_process_of_an_evaluation_costs_its_rows_alone(monkeypatch):
  def broken(images, texts, records):
    raise UserError("no such service")

  rewards = MultiReward({"r": broken}, {"r": 1.0}, {}, {"r": 0.0}, isolate_failures=False)
  images, prompts = np.zeros((4, 2, 2, 3), np.uint8), [Prompt(str(i), {}) for i in range(4)]
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  other = [[1, 3], {"r": [0.5, 0.5]}, {}]
  monkeypatch.setattr(multihost, "gather", lambda own: [json.loads(json.dumps(own)), other])
  shared = score_shared(rewards, images, prompts, ["r"])
  np.testing.assert_array_equal(shared.values["r"], np.float32([np.nan, 0.5, np.nan, 0.5]))
  assert shared.reasons == {"r": "process 0: no such service"}


@pytest.mark.slow
def test_both_stages_of_several_processes_equal_those_of_one(tmp_path):
  mesh, found = "2,4,1", {}
  for count in (1, 4):
    folder = tmp_path / str(count)
    folder.mkdir()
    command = ["tests/support/sharded_run.py", 8 // count, 4, folder, mesh]
    for code, _, said in finish(start([command] * count, folder, 8 // count)):
      assert code == 0, said
    found[count] = np.load(folder / f"{mesh}.npz")
  one = found.pop(1)
  assert {"stage1/loss/generator", "stage2/loss/policy", "stage2/params/generator"} <= set(one)
  # Half of an adapter starts at zero; all of it has moved.
  assert all(np.mean(one[name] == 0) < 0.01 for name in one if "params" in name)
  for count, many in found.items():
    assert set(one) == set(many) and many["stage2/split"][0]
    for name in one:
      tolerance = 1e-4 if "params" in name else 1e-5
      np.testing.assert_allclose(
        many[name], one[name], rtol=tolerance, atol=tolerance, err_msg=f"{count} {name}"
      )


@pytest.mark.slow
def test_encodings_of_several_processes_equal_those_of_one(tmp_path):
  mesh, found = "2,4,1", {}
  for count in (1, 2):
    folder = tmp_path / str(count)
    folder.mkdir()
    command = ["tests/support/encoded_run.py", 8 // count, folder, mesh]
    for code, _, said in finish(start([command] * count, folder, 8 // count)):
      assert code == 0, said
    found[count] = np.load(folder / f"{mesh}.npz")
  for name in ("tokens", "pooled", "reward"):
    np.testing.assert_allclose(found[2][name], found[1][name], atol=1e-5, err_msg=name)


SMALL = [
  *("--config=configs/tiny_stage2.py", "--config.batch.micro_batches=1"),
  *(
    "--config.batch.prompts=2",
    "--config.batch.images_per_prompt=2",
    "--config.eval.final_prompts=3",
  ),
  *("--config.eval.prompts=2", "--config.eval.chunk=2", "--config.eval.preview=2"),
  *("--config.eval.teacher_steps=1", "--config.train.log_every=1", "--config.train.steps=4"),
  "--config.ema.decay=0.9",
]


def _command(workdir, *more):
  return ["-m", "rtdmd_jax.main", f"--workdir={workdir}", *SMALL, *more]


def _losses(workdir):
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {
    (line["step"], name): value
    for line in lines
    for name, value in line["scalars"].items()
    if name.startswith(("loss/", "reward/", "eval/"))
  }


@pytest.mark.slow
def test_a_signal_to_one_process_saves_in_all_and_they_go_on_together(tmp_path):
  ((code, _, said),) = finish(start([_command(tmp_path / "one")], tmp_path, 2))
  assert code == 0, said
  running = start([_command(tmp_path / "two")] * 2, tmp_path, 1)
  while not (line := running[0].stdout.readline()).startswith("step 1/"):
    assert line, finish(running)
  running[1].send_signal(signal.SIGTERM)
  stopped = [said for code, _, said in finish(running) if code == errors.EXIT_PREEMPTED]
  saved = [re.search(r"checkpoint (\d) is saved", said)[1] for said in stopped]
  assert len(saved) == 2 and saved[0] == saved[1] in ("2", "3"), stopped
  (code, out, said), (other, quiet, _) = finish(
    start([_command(tmp_path / "two")] * 2, tmp_path, 1)
  )
  assert (code, other) == (0, 0), said
  assert f"resuming after step {saved[0]}" in out and "report:" in out
  # What gloo itself says comes from below Python.
  assert not [line for line in quiet.splitlines() if not line.startswith("[Gloo]")]
  one, two = _losses(tmp_path / "one"), _losses(tmp_path / "two")
  assert one.keys() == two.keys() and len(one) > 20
  for key in one:
    np.testing.assert_allclose(two[key], one[key], rtol=1e-5, atol=1e-5, err_msg=str(key))
  for name in ("generator", "fake_score"):
    file = f"export/{name}/adapter_model.safetensors"
    expected, got = (load_file(tmp_path / run / file) for run in ("one", "two"))
    for key, value in expected.items():
      np.testing.assert_allclose(got[key], value, rtol=1e-4, atol=1e-4, err_msg=key)


@pytest.mark.slow
def test_processes_that_differ_stop_at_once(tmp_path):
  commands = [_command(tmp_path / "run"), _command(tmp_path / "run", "--config.seed=7")]
  for code, _, said in finish(start(commands, tmp_path, 1)):
    assert code == 2, said
    assert "error: process 1 differs from process 0 in config.seed: 42 -> 7; start all" in said
  assert not list((tmp_path / "run").glob("*"))
