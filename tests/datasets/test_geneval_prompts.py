import hashlib
import json
from collections import Counter

import pytest

from rtdmd_jax import cli
from rtdmd_jax.datasets import geneval, geneval_records
from rtdmd_jax.datasets.geneval_records import CLASSES, scene_key
from rtdmd_jax.datasets.prompts import load_prompts


def test_the_published_test_is_drawn_again():
  records = geneval.test_records()
  counts = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94}
  assert Counter(r["tag"] for r in records) == counts | {"position": 100, "color_attr": 100}
  prompts = [r["prompt"] for r in records]
  # Of the 553 published prompts, sorted; the file itself is not part of the project.
  assert (
    hashlib.sha256("\n".join(sorted(prompts)).encode()).hexdigest()
    == "db13d3b9aa8c662809a99c92f2af07b46958f6017d12755e52462a5a9fc428d7"
  )
  assert records[0]["prompt"] == "a photo of a bench"


def test_training_scenes_are_not_those_of_the_test_in_any_wording():
  records = geneval.training_records(1700, 3)
  test = {scene_key(r) for r in geneval.test_records()}
  assert not test & {scene_key(r) for r in records}
  assert Counter(r["tag"] for r in records) == {
    "position": 700, "counting": 500, "color_attr": 300, "colors": 100, "two_object": 100,
  }  # fmt: skip
  # Nothing comes twice before everything came once.
  prompts = Counter(r["prompt"] for r in records if r["tag"] == "counting")
  assert len(prompts) == 3 * len(CLASSES) - 80 and set(prompts.values()) <= {3, 4}
  assert records == geneval.training_records(1700, 3) != geneval.training_records(1700, 4)
  for record in records:
    things = [entry["class"] for entry in record["include"]]
    assert len(set(things)) == len(things)
    assert not any("color" in e and e["class"] == "person" for e in record["include"])


def test_a_tag_without_scenes_is_an_error():
  with pytest.raises(ValueError, match="single_object"):
    geneval.training_records(10, 0, shares={"single_object": 1})


def _write(path, *records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return path


def test_scenes_of_a_users_file_are_left_out_too(tmp_path, capsys):
  one = next(r for r in geneval.training_records(50, 0) if r["tag"] == "counting")
  above = geneval_records.position("cup", "above", "tie")
  below = geneval_records.position("tie", "below", "cup")
  file = _write(tmp_path / "evaluation_metadata.jsonl", one, below)
  out = tmp_path / "out"
  plain = {r["prompt"] for r in geneval.training_records(60_000, 0)}
  assert {one["prompt"], above["prompt"]} <= plain
  assert _tool(f"--out={out}", "--count=60000", f"--exclude={file}") == 0
  train = {p.text for p in load_prompts(out, metadata=True)}
  assert not {one["prompt"], above["prompt"], below["prompt"]} & train
  assert not {r["prompt"] for r in geneval.test_records()} & train
  capsys.readouterr()
  for records, words in [
    ([one, {"prompt": "a cup"}], "record 2"),
    ([below | {"include": below["include"][:1]}], "record 1"),
    ([geneval_records.counting(c, n) for c in CLASSES for n in (2, 3, 4)], "counting"),
  ]:
    bad = _write(tmp_path / "bad.jsonl", *records)
    assert _tool(f"--out={tmp_path / 'none'}", f"--exclude={bad}") == 2
    assert words in capsys.readouterr().err
  assert not (tmp_path / "none").exists()


def _tool(*arguments):
  return cli.run(
    geneval.main, ["geneval", *arguments], define_flags=geneval.define_flags, requires=("out",)
  )


def test_the_tool_writes_what_training_reads(tmp_path, capsys):
  assert _tool(f"--out={tmp_path / 'prompts'}", "--count=34") == 0
  assert len(load_prompts(tmp_path / "prompts", metadata=True)) == 34
  test = load_prompts(tmp_path / "prompts", split="test", metadata=True)
  assert [p.record for p in test] == json.loads(json.dumps(geneval.evaluation_records()))
  # As in the published file: 2,212 lines, in every quarter each record once.
  quarters = [test[i : i + 553] for i in range(0, 2212, 553)]
  assert len(test) == 2212 and quarters[0] != quarters[1]
  for quarter in quarters:
    assert {p.text for p in quarter} == {r["prompt"] for r in geneval.test_records()}
  (tmp_path / "file").write_text("")
  assert _tool(f"--out={tmp_path / 'file'}") == 2
  assert "no folder can be made" in capsys.readouterr().err
