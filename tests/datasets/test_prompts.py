import json

import numpy as np
import pytest

from rtdmd_jax.datasets.prompts import Prompt, load_prompts, prompt_batch
from rtdmd_jax.errors import UserError

GENEVAL = {
  "tag": "position",
  "include": [
    {"class": "cup", "count": 1},
    {"class": "tie", "count": 1, "position": ["left of", 0]},
  ],
  "prompt": "a photo of a tie left of a cup",
}
GENEVAL2 = {
  "prompt": "two red kites",
  "atom_count": 3,
  "vqa_list": [["How many kites are in the image?", "two"]],
  "skills": ["count"],
}


def write(path, text):
  path.write_text(text, encoding="utf-8")
  return path


def test_text_lines(tmp_path):
  path = write(tmp_path / "p.txt", '\ufeffa cat\n\n  a sign that says "Hé" \r\nlast')
  assert load_prompts(path) == [
    Prompt(text, {"prompt": text}) for text in ("a cat", 'a sign that says "Hé"', "last")
  ]


def test_jsonl_records(tmp_path):
  rows = [GENEVAL, GENEVAL2, {"text": "by text"}, "bare"]
  path = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
  got = load_prompts(path)
  assert [p.text for p in got] == [GENEVAL["prompt"], "two red kites", "by text", "bare"]
  assert [p.record for p in got] == [GENEVAL, GENEVAL2, {"text": "by text"}, {"prompt": "bare"}]


@pytest.mark.parametrize("rows", [["a", "b"], [{"prompt": "a"}, {"text": "b"}]])
def test_json_list(tmp_path, rows):
  path = write(tmp_path / "p.json", json.dumps(rows, indent=1))
  assert [p.text for p in load_prompts(path)] == ["a", "b"]


def test_folder_search_order(tmp_path):
  write(tmp_path / "prompts.txt", "last")
  write(tmp_path / "train_metadata.jsonl", json.dumps(GENEVAL))
  write(tmp_path / "train.txt", "train")
  write(tmp_path / "test_metadata.jsonl", json.dumps(GENEVAL2))
  write(tmp_path / "test.txt", "test")
  first = lambda **kw: load_prompts(tmp_path, **kw)[0].text  # noqa: E731
  assert first() == "train"
  assert first(metadata=True) == GENEVAL["prompt"]
  assert first(split="test") == "test"
  assert first(split="test", metadata=True) == GENEVAL2["prompt"]
  for name in ("train.txt", "train_metadata.jsonl"):
    (tmp_path / name).unlink()
  assert first() == "last"


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("p.txt", "\n \n", "p.txt holds no prompts"),
    ("p.jsonl", "", "p.jsonl holds no prompts"),
    ("p.json", "", "p.json holds no prompts"),
    ("p.csv", "a", "end in .txt, .text, .jsonl, .json, not '.csv'"),
    ("p.jsonl", '"a"\n\n{"prompt": \n', "p.jsonl, line 3: is not JSON"),
    ("p.jsonl", '{"prompt": "a"}\n{"tag": "x"}\n', "p.jsonl, line 2: needs a non-empty string"),
    ("p.jsonl", "17\n", "p.jsonl, line 1: expected a string or an object, not 17"),
    ("p.json", '["a",\n "b"', "p.json: is not JSON .*line 2"),
    ("p.json", '{"prompt": "a"}', "must hold a JSON list of prompts, not dict"),
    ("p.json", '["a", null]', "p.json, entry 2: expected a string"),
  ],
)
def test_broken_files(tmp_path, name, text, message):
  with pytest.raises(UserError, match=message):
    load_prompts(write(tmp_path / name, text))


def test_missing_and_binary_files(tmp_path):
  with pytest.raises(UserError, match="absent.txt does not exist"):
    load_prompts(tmp_path / "absent.txt")
  with pytest.raises(UserError, match="holds none of the prompt files train.txt, train.jsonl"):
    load_prompts(tmp_path)
  (tmp_path / "p.txt").write_bytes(b"fine\n\xff\xfe\n")
  with pytest.raises(UserError, match="p.txt, line 2: is not UTF-8"):
    load_prompts(tmp_path / "p.txt")


def test_batches_of_a_pass_do_not_overlap_and_passes_differ():
  def run(seed, steps):
    return [prompt_batch(seed, step, 10, 3, 1)[0] for step in steps]

  passes = [np.concatenate(run(7, range(3 * e, 3 * e + 3))) for e in range(4)]
  for one in passes:
    assert len(set(one)) == 9 and set(one) <= set(range(10))
  assert len({tuple(one) for one in passes}) == 4
  assert {tuple(b) for b in run(7, range(3))} != {tuple(b) for b in run(8, range(3))}
  # Every prompt has its turn although each pass leaves one out.
  assert set(np.concatenate(run(7, range(30)))) == set(range(10))


def test_order_is_frozen():
  """The sequence is part of what a checkpoint resumes; these numbers must never change."""
  got = [prompt_batch(42, step, 7, 2, 1)[0].tolist() for step in (0, 1, 2, 3, 300)]
  assert got == [[3, 6], [4, 0], [1, 5], [1, 2], [0, 6]]


def test_repeats_and_sample_indices():
  seen = []
  for step in range(4):
    prompts, samples = prompt_batch(1, step, 6, 3, 4)
    assert prompts.shape == samples.shape == (12,) and samples.dtype == np.uint32
    groups = prompts.reshape(3, 4)
    assert (groups == groups[:, :1]).all() and len(set(groups[:, 0])) == 3
    seen += samples.tolist()
  assert seen == list(range(48))
  assert prompt_batch(1, 2**31, 6, 3, 4)[1][0] == (2**31 * 12) % 2**32


def test_bad_counts():
  with pytest.raises(UserError, match="takes 8 distinct prompts, but the prompt list has 3"):
    prompt_batch(0, 0, 3, 8, 1)
  for arguments in [(0, -1, 3, 1, 1), (0, 0, 0, 1, 1), (0, 0, 3, 1, 0)]:
    with pytest.raises(ValueError, match="positive counts"):
      prompt_batch(*arguments)
