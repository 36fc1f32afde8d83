"""Which changes a resumed run accepts."""

import pytest

from rtdmd_jax.config import config_diff
from rtdmd_jax.errors import UserError
from rtdmd_jax.training.resume import check_content, check_resume, read_stored_config, store_config


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


def test_many_changes_are_counted_and_long_values_cut():
  old = {"lora": {f"k{i:02}": "x" * 900 for i in range(20)}}
  with pytest.raises(UserError, match="; and 14 more") as refused:
    check_resume("run/3", old, {}, ["lora"])
  assert "lora.k05" in str(refused.value) and "lora.k06" not in str(refused.value)
  assert len(str(refused.value)) < 2000


def test_what_is_read_must_not_change():
  old = {"teacher": "aa", "data.prompts": "bb", "model.pretrained, vae": "cc", "gone": "x"}
  new = old | {"data.prompts": "dd", "model.pretrained, vae": "ee", "added": "y"}
  del new["gone"]
  assert check_content("run/3", old, old) == []
  both = "data.prompts; model.pretrained, vae has changed under the same path"
  with pytest.raises(UserError, match=f"cannot resume run/3: the content of {both}"):
    check_content("run/3", old, new)
  lines = ["the content of data.prompts", "the content of model.pretrained, vae"]
  assert check_content("run/3", old, new, allow=True) == lines
  # Another path was judged already, and has another content of course.
  moved = ['model.pretrained: "a" -> "b"', 'data.prompts: "a" -> "b"']
  assert check_content("run/3", old, new, moved) == []


def test_stored_config(tmp_path):
  path = tmp_path / "config.json"
  with pytest.raises(UserError, match="config.json cannot be read"):
    read_stored_config(path)
  store_config(path, OLD)
  assert read_stored_config(path) == OLD
  for text, message in (("{", "config.json: is not JSON"), ("[]", "holds no JSON object")):
    path.write_text(text)
    with pytest.raises(UserError, match=message):
      read_stored_config(path)
