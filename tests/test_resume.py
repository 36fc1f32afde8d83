"""Which changes a resumed run accepts."""

import pytest

from rtdmd_jax.errors import UserError
from rtdmd_jax.resume import (
  check_resume,
  check_weights,
  config_diff,
  read_stored_config,
  store_config,
)


def test_config_diff():
  old = {"a": 1, "b": {"c": (1, 2), "d": "x"}, "gone": None}
  new = {"a": 2, "b": {"c": [1, 2], "d": "y", "e": True}}
  assert config_diff(old, new) == [
    "a: 1 -> 2",
    'b.d: "x" -> "y"',
    "b.e: absent -> true",
    "gone: null -> absent",
  ]


OLD = {"lora": {"rank": 4, "alpha": 8}, "log": {"every": 1}, "loss": {"name": "dmd"}}
NEW = {"lora": {"rank": 8, "alpha": 8}, "log": {"every": 2}, "loss": {"name": "dmd"}}


def test_fixed_keys_must_not_change():
  assert check_resume("run/3", OLD, OLD, ["lora", "loss"]) == []
  with pytest.raises(UserError, match=r"resume run/3 .*\(lora.rank: 4 -> 8\)"):
    check_resume("run/3", OLD, NEW, ["lora", "loss"])
  both = ["log.every: 1 -> 2", "lora.rank: 4 -> 8"]
  assert check_resume("run/3", OLD, NEW, ["lora.alpha", "lo"]) == both
  assert check_resume("run/3", OLD, NEW, ["lora"], allow=True) == both


def test_frozen_weights_must_not_change():
  old, new = {"teacher": "aa", "generator": "bb"}, {"teacher": "aa", "generator": "cc"}
  assert check_weights("run/3", old, old) == []
  with pytest.raises(UserError, match='generator: "bb" -> "cc"'):
    check_weights("run/3", old, new)
  assert check_weights("run/3", old, new, allow=True) == ['generator: "bb" -> "cc"']


def test_stored_config(tmp_path):
  path = tmp_path / "config.json"
  with pytest.raises(UserError, match="config.json is missing or not JSON"):
    read_stored_config(path)
  store_config(path, OLD)
  assert read_stored_config(path) == OLD
  path.write_text("{")
  with pytest.raises(UserError, match="config.json is missing or not JSON"):
    read_stored_config(path)
