"""Prompts that lack what a reward needs."""

import json

import pytest

from rtdmd_jax.datasets.prompts import Prompt
from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.needs import check_training_prompts, shortage, unscorable

RECORD = {"tag": "colors", "include": [{"class": "ring", "count": 1, "color": "red"}]}
PROMPTS = [
  Prompt("a red ring", RECORD),
  Prompt('a sign that says "stop"', {"vqa_list": [["Is there a sign?", "yes"]]}),
  Prompt("a cat", {"prompt": "a cat"}),
  Prompt('an empty "" sign', {"tag": "colors", "include": 3, "vqa_list": "none"}),
  Prompt("a dog", {"tag": "position", "include": [{"class": "a", "count": 1, "position": 1}]}),
]
LOCAL = {"detector": "shapes"}


@pytest.mark.parametrize(
  ("name", "options", "lacking"),
  [
    ("geneval", LOCAL, [1, 2, 3, 4]),
    ("geneval", {"url": "http://x"}, [1, 2, 3, 4]),
    ("geneval", {"url": "http://x", "reward": "other"}, []),
    ("geneval2", {"openai_url": "http://x"}, [0, 2, 3, 4]),
    ("geneval2", {"url": "http://x"}, []),
    ("ocr", {}, [0, 2, 3, 4]),
    ("hpsv3", {}, []),
    ("my.module:Reward", {}, []),
  ],
)
def test_what_each_reward_needs(name, options, lacking):
  assert unscorable(name, PROMPTS, options) == lacking


def test_questions_may_be_in_a_file(tmp_path):
  file = tmp_path / "questions.jsonl"
  file.write_text(json.dumps({"prompt": "a cat", "vqa_list": [["Is there a cat?", "yes"]]}))
  options = {"answerer": "a:b", "questions": str(file)}
  assert unscorable("geneval2", PROMPTS, options) == [0, 3, 4]


def test_the_sentence_names_reward_prompts_and_first_prompt():
  said = shortage("eval.rewards", "ocr", PROMPTS, "prompts/x", {})
  assert said == (
    "eval.rewards.ocr cannot score 4 of the 5 prompts of prompts/x, the first of them 'a red ring':"
    " it needs a text in double quotes in each prompt."
  )
  assert shortage("eval.rewards", "ocr", PROMPTS[1:2], "prompts/x", {}) is None


@pytest.mark.parametrize(
  ("name", "options", "ends"),
  [
    ("geneval", LOCAL, True),  # it refuses any such batch
    ("geneval", {**LOCAL, "max_failed": 1.0}, True),
    ("geneval", {"url": "http://x"}, True),
    ("geneval", {"url": "http://x", "max_failed": 0.9}, False),
    ("ocr", {}, True),
    ("ocr", {"max_failed": 0.8}, False),
    ("ocr", {"weight": 0.0}, False),
  ],
)
def test_training_prompts_that_would_end_the_run_are_refused(name, options, ends):
  rewards = {name: {"weight": 1.0, **options}}
  if ends:
    with pytest.raises(UserError, match=f"rewards.{name} cannot score 4 of the 5 prompts of p, "):
      check_training_prompts(rewards, PROMPTS, "p")
  else:
    assert check_training_prompts(rewards, PROMPTS, "p").startswith(f"rewards.{name} cannot score")
  assert check_training_prompts({"hpsv3": {"weight": 1.0}}, PROMPTS, "p") == ""
