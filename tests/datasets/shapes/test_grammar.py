import json

import pytest

from rtdmd_jax.datasets.shapes import __main__ as cli
from rtdmd_jax.datasets.shapes.grammar import SHAPES, TAGS, all_records, split


def _prompts(records):
  return {r["prompt"] for r in records}


def _by_prompt():
  return {r["prompt"]: r for r in all_records()}


def test_prompts_are_unique_short_and_cover_the_six_tags():
  records = all_records()
  assert len(_prompts(records)) == len(records) == 460
  assert {r["tag"] for r in records} == set(TAGS)
  assert max(len(r["prompt"].split()) for r in records) == 10


def test_records_follow_the_published_grammar():
  records = _by_prompt()
  assert records["a photo of a circle"]["include"] == [{"class": "circle", "count": 1}]
  crosses = records["a photo of three crosses"]
  assert crosses["include"] == [{"class": "cross", "count": 3}]
  assert crosses["exclude"] == [{"class": "cross", "count": 4}]
  assert records["a photo of a circle left of a square"]["include"] == [
    {"class": "square", "count": 1},
    {"class": "circle", "count": 1, "position": ["left of", 0]},
  ]
  assert records["a photo of a red cross and a blue square"]["include"] == [
    {"class": "cross", "count": 1, "color": "red"},
    {"class": "square", "count": 1, "color": "blue"},
  ]


def test_split_is_disjoint_complete_and_never_empty():
  records = all_records()
  train, held_out = split(records)
  assert _prompts(train) | _prompts(held_out) == _prompts(records)
  assert not _prompts(train) & _prompts(held_out)
  for tag in TAGS:
    share = sum(r["tag"] == tag for r in held_out) / sum(r["tag"] == tag for r in records)
    assert 0.2 <= share <= 0.35, tag


def test_split_does_not_depend_on_the_order():
  held_out = split(all_records())[1]
  assert _prompts(split(all_records()[::-1])[1]) == _prompts(held_out)


def test_two_wordings_of_one_scene_stay_together():
  held_out = _prompts(split(all_records())[1])
  for a in SHAPES:
    for b in SHAPES:
      if a == b:
        continue
      for first, second in (
        (f"a {a} left of a {b}", f"a {b} right of a {a}"),
        (f"a {a} above a {b}", f"a {b} below a {a}"),
        (f"a {a} and a {b}", f"a {b} and a {a}"),
        (f"a red {a} and a black {b}", f"a black {b} and a red {a}"),
      ):
        assert (f"a photo of {first}" in held_out) == (f"a photo of {second}" in held_out)


def test_a_tag_with_one_scene_cannot_be_split():
  with pytest.raises(ValueError, match="single_object"):
    split(all_records()[:1])


def test_command_line_writes_both_files(tmp_path, capsys):
  cli.main(["--out", str(tmp_path / "new")])
  train = (tmp_path / "new" / "train_metadata.jsonl").read_text().splitlines()
  test = (tmp_path / "new" / "test_metadata.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in train] == split(all_records())[0]
  assert [json.loads(line) for line in test] == split(all_records())[1]
  assert f"{len(test)} records" in capsys.readouterr().out
