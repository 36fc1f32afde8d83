import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.checkpoint import Checkpoints, check_resume, config_diff, store_config
from rtdmd_jax.errors import UserError


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


def test_unfinished_checkpoint_is_not_seen(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"x": jnp.ones(2)}, None)
  (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.all_steps == [1]


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


def test_config_diff():
  old = {"a": 1, "b": {"c": (1, 2), "d": "x"}, "gone": None}
  new = {"a": 2, "b": {"c": [1, 2], "d": "y", "e": True}}
  assert config_diff(old, new) == [
    "a: 1 -> 2",
    'b.d: "x" -> "y"',
    "b.e: absent -> true",
    "gone: null -> absent",
  ]


def test_check_resume(tmp_path):
  path = tmp_path / "config.json"
  old = {"lora": {"rank": 4, "alpha": 8}, "log": {"every": 1}, "loss": {"name": "dmd"}}
  with pytest.raises(UserError, match="config.json is missing or not JSON"):
    check_resume(path, old, ["lora"])
  store_config(path, old)
  assert json.loads(path.read_text()) == old
  new = {"lora": {"rank": 8, "alpha": 8}, "log": {"every": 2}, "loss": {"name": "dmd"}}
  assert check_resume(path, old, ["lora", "loss"]) == []
  with pytest.raises(UserError, match=r"\(lora.rank: 4 -> 8\)"):
    check_resume(path, new, ["lora", "loss"])
  assert check_resume(path, new, ["lora.alpha", "lo"]) == ["log.every: 1 -> 2", "lora.rank: 4 -> 8"]
