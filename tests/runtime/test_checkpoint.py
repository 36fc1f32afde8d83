import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime.checkpoint import Checkpoints


class Moments(NamedTuple):
  count: jax.Array
  mu: dict


def make_state(value=0.0, impl="threefry2x32"):
  return {
    "step": jnp.int32(3),
    "lora": {"block.0/to_q": {"a": jnp.full((4, 2), value), "b": jnp.ones((2, 4), jnp.bfloat16)}},
    "optimizer": (Moments(jnp.int32(7), {"x": jnp.arange(3.0)}), ()),
    "keys": {"noise": jax.random.key(5, impl=impl), "many": jax.random.split(jax.random.key(1), 3)},
  }


def abstract(state):
  return jax.eval_shape(lambda: state)


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert left.dtype == right.dtype
    if jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
      left, right = jax.random.key_data(left), jax.random.key_data(right)
    np.testing.assert_array_equal(np.asarray(left, np.float32), np.asarray(right, np.float32))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_round_trip(tmp_path, impl):
  state = make_state(2.0, impl)
  with Checkpoints(tmp_path / "new/ck") as checkpoints:
    assert checkpoints.latest_step is None
    assert checkpoints.save(3, state, {"cursor": 9})
    assert not checkpoints.save(3, state, {"cursor": 9})
    checkpoints.wait()
    got, extra = checkpoints.restore(abstract(state))
  assert extra == {"cursor": 9}
  assert_same(got, state)
  draw = jax.random.normal(got["keys"]["noise"])
  assert draw == jax.random.normal(state["keys"]["noise"])


def test_concrete_state_as_template_and_read_only(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, make_state(1.0), None)
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    got, extra = checkpoints.restore(make_state(0.0))
  assert extra is None
  assert_same(got, make_state(1.0))
  with pytest.raises(UserError, match="does not exist"):
    Checkpoints(tmp_path / "missing", read_only=True)


def test_keep_and_discard(tmp_path):
  with Checkpoints(tmp_path, keep=2, keep_every=4) as checkpoints:
    for step in range(1, 8):
      checkpoints.save(step, {"x": jnp.float32(step)}, None)
    checkpoints.wait()
    assert checkpoints.all_steps == [4, 6, 7]
    with pytest.raises(ValueError, match="call discard_after first"):
      checkpoints.save(5, {"x": jnp.float32(0)}, None)
    checkpoints.discard_after(4)
    assert checkpoints.all_steps == [4]
    assert checkpoints.save(5, {"x": jnp.float32(50)}, None)
    assert checkpoints.restore({"x": jnp.float32(0)})[0]["x"] == 50
    assert checkpoints.restore({"x": jnp.float32(0)}, step=4)[0]["x"] == 4


def test_missing_checkpoint(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(UserError, match="holds no checkpoint"):
      checkpoints.restore({"x": jnp.ones(2)})
    checkpoints.save(2, {"x": jnp.ones(2)}, None)
    with pytest.raises(UserError, match="has no checkpoint 5; it has 2"):
      checkpoints.restore({"x": jnp.ones(2)}, step=5)


@pytest.mark.parametrize(
  "other, message",
  [
    ({"a": {"x": jnp.ones((2, 3))}}, "has a leaf a/y that this configuration does not have"),
    (
      {"a": {"x": jnp.ones((2, 3)), "y": jnp.ones(1), "z": jnp.ones(1)}},
      "lacks the leaf a/z that this configuration has",
    ),
    (
      {"a": {"x": jnp.ones((4, 3)), "y": jnp.ones(1)}},
      r"leaf a/x is float32\[2, 3\], this configuration has float32\[4, 3\]",
    ),
    ({"a": {"x": jnp.ones((2, 3)), "y": jnp.ones(1, jnp.bfloat16)}}, "leaf a/y is float32"),
  ],
)
def test_another_tree_names_the_leaf(tmp_path, other, message):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"a": {"x": jnp.ones((2, 3)), "y": jnp.ones(1)}}, None)
    with pytest.raises(UserError, match=message):
      checkpoints.restore(other)


@pytest.mark.parametrize("damage", ["truncate", "manifest", "metadata"])
def test_corrupted_checkpoint(tmp_path, damage):
  state = {"x": jnp.arange(64.0)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, None)
  with Checkpoints(tmp_path) as checkpoints:
    assert_same(checkpoints.restore(state)[0], state)
  folder = tmp_path / "1" / "state"
  if damage == "truncate":
    for path in folder.rglob("d/*"):
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  elif damage == "manifest":
    for path in folder.rglob("manifest.ocdbt"):
      path.write_bytes(b"nothing")
  else:
    (folder / "_METADATA").write_text("{")
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(UserError, match="1 cannot be read .*delete that folder"):
      checkpoints.restore(state)


def test_unfinished_checkpoint_is_not_seen_and_removed(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"x": jnp.ones(2)}, None)
  (tmp_path / "2.orbax-checkpoint-tmp/state").mkdir(parents=True)
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.all_steps == [1]
  assert (tmp_path / "2.orbax-checkpoint-tmp").exists()
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.all_steps == [1]
    assert checkpoints.save(2, {"x": jnp.ones(2)}, None)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_any_single_bit_is_right_or_missed(tmp_path):
  state = {"x": jax.random.normal(jax.random.key(0), (64, 8)), "n": jnp.int32(3)}
  with Checkpoints(tmp_path / "whole") as checkpoints:
    checkpoints.save(1, state, {"cursor": 1234})
  draw, found = random.Random(0), 0
  for trial in range(40):
    copy = shutil.copytree(tmp_path / "whole", tmp_path / str(trial))
    files = sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size)
    # Every second time the largest file, which holds the values.
    file = draw.choice(files) if trial % 2 else max(files, key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    with Checkpoints(copy) as checkpoints:
      try:
        got, extra = checkpoints.restore(state)
      except UserError as error:
        assert str(copy) in str(error)
        found += 1
      else:
        assert_same(got, state)
        assert extra == {"cursor": 1234}
  assert found >= 20


def test_a_full_disk_is_one_sentence_and_older_checkpoints_survive(tmp_path, capfd):
  small = {"x": jnp.ones(4)}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, small, None)
    checkpoints.wait()
    # Files that may not grow fail like a disk that is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
      checkpoints.save(2, {"x": jax.random.normal(jax.random.key(0), (256, 256))}, None)
      with pytest.raises(UserError, match=r"cannot be written to .*too large.*checkpoints: 1\)"):
        checkpoints.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_same(checkpoints.restore(small)[0], small)
    assert checkpoints.save(3, small, None)
  assert "Traceback" not in "".join(capfd.readouterr())
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.all_steps == [1, 3]


SAVES = """
import sys, jax, jax.numpy as jnp
from rtdmd_jax.runtime.checkpoint import Checkpoints
with Checkpoints(sys.argv[1], keep=2) as checkpoints:
  start = checkpoints.latest_step or 0
  if start:
    state, extra = checkpoints.restore({"x": jnp.zeros((256, 256))})
    assert (state["x"] == start).all() and extra == {"step": start}
  print(start, flush=True)
  for step in range(start + 1, start + 1000):
    checkpoints.save(step, {"x": jnp.full((256, 256), float(step))}, {"step": step})
"""


@pytest.mark.slow
def test_killed_while_saving_the_last_complete_checkpoint_is_used(tmp_path):
  draw, starts = random.Random(1), []
  for _ in range(6):
    process = subprocess.Popen(
      [sys.executable, "-c", SAVES, tmp_path / "ck"], stdout=subprocess.PIPE, text=True
    )
    starts.append(int(process.stdout.readline()))
    deadline = time.time() + 30
    # Steps are saved one after the other, so below the second one is complete.
    while time.time() < deadline and not [
      path for path in tmp_path.glob("ck/*tmp*") if int(path.name.split(".")[0]) > starts[-1] + 1
    ]:
      time.sleep(0.001)
    time.sleep(draw.random() * 0.3)
    process.kill()
    assert process.wait() == -signal.SIGKILL
  assert starts[0] == 0 and starts == sorted(set(starts)), starts


def test_unwritable_directory(tmp_path):
  (tmp_path / "file").write_text("")
  for path in (tmp_path / "file/ck", Path("/proc/ck")):
    with pytest.raises(UserError, match=f"{path} cannot be written"):
      Checkpoints(path)


def test_unsupported_leaves_and_names(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match="must be arrays, got int"):
      checkpoints.save(1, {"x": 1}, None)
    with pytest.raises(ValueError, match="float64"):
      checkpoints.save(1, {"x": np.zeros(2)}, None)
    with pytest.raises(ValueError, match="two leaves of the state have the name a/b"):
      checkpoints.save(1, {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, None)


def test_some_leaves_alone(tmp_path, monkeypatch, capfd):
  monkeypatch.chdir(tmp_path)
  state = {"ema": {"x": {"a": jnp.arange(4.0), "b": jnp.ones(2, jnp.bfloat16)}}, "opt": jnp.ones(9)}
  with Checkpoints(tmp_path / "ck") as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, jax.tree.map(lambda x, s=step: s * x, state), None)
  with Checkpoints("ck", read_only=True) as checkpoints:
    leaves = checkpoints.read_leaves(["ema"], 1)
    assert capfd.readouterr().err == ""
    assert leaves.keys() == {"ema/x/a", "ema/x/b"}
    np.testing.assert_array_equal(leaves["ema/x/a"], state["ema"]["x"]["a"])
    assert leaves["ema/x/b"].dtype == jnp.bfloat16
    assert checkpoints.read_leaves(["ema"])["ema/x/a"][3] == 6
    with pytest.raises(UserError, match="has no checkpoint 3; it has 1, 2"):
      checkpoints.read_leaves(["ema"], 3)
    monkeypatch.setattr(
      "rtdmd_jax.runtime.checkpoint.checksums", lambda leaves: dict.fromkeys(leaves, -1)
    )
    with pytest.raises(UserError, match="damaged: the leaf ema/x/a is not what was written"):
      checkpoints.read_leaves(["ema"], 2)
