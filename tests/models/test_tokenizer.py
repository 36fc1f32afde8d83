"""Tokenizer directories as they are published, and ids that an encoder has no embedding for."""

import json
import shutil
from functools import partial

import numpy as np
import pytest

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.tokenizer import Limit, checked_ids, load_tokenizer, longer, tokenize
from rtdmd_jax.pipeline.describe import text_limits
from rtdmd_jax.pipeline.text import cut_prompts, describe_sd3_text, sd3_limits
from rtdmd_jax.rewards.device.clipscore import ClipScore
from rtdmd_jax.weights.source import read_file
from tests.support.paths import TINY

PROMPTS = ["a photo of a red circle", "Two BLUE squares, and 3 crosses?", " é  猫 ", ""]
CLIP = json.loads((TINY / "tokenizer/tokenizer.json").read_text())
SPECIAL = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def published_clip(directory):
  """CLIP's tokenizer as the second of Stable Diffusion 3, which has no tokenizer.json."""
  directory.mkdir()
  tokens = {
    "bos_token": {"content": "<|startoftext|>", **SPECIAL},
    "eos_token": {"content": "<|endoftext|>", **SPECIAL},
    "pad_token": "!",
    "unk_token": {"content": "<|endoftext|>", **SPECIAL},
  }
  settings = {
    **tokens,
    "add_prefix_space": False,
    "do_lower_case": True,
    "errors": "replace",
    "model_max_length": 12,
    "tokenizer_class": "CLIPTokenizer",
  }
  merges = "\n".join(" ".join(pair) for pair in CLIP["model"]["merges"])
  (directory / "vocab.json").write_text(json.dumps(CLIP["model"]["vocab"]))
  (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
  (directory / "special_tokens_map.json").write_text(json.dumps(tokens))
  (directory / "tokenizer_config.json").write_text(json.dumps(settings))
  return directory


def add_token(directory, number):
  file = directory / "tokenizer.json"
  value = json.loads(file.read_text())
  token = {"id": number, "content": "<style>", "special": False} | SPECIAL
  value["added_tokens"].append(token | {"normalized": False})
  file.write_text(json.dumps(value))


def test_vocabulary_and_merges_are_a_tokenizer(tmp_path):
  ids = partial(tokenize, prompts=PROMPTS, length=12, vocabulary=587)
  whole = ids(load_tokenizer(TINY / "tokenizer"))
  parts = load_tokenizer(published_clip(tmp_path / "clip"))
  assert parts.pad_token == "!" and parts.model_max_length == 12
  for one, other in zip(ids(parts), whole, strict=True):
    length = list(other).index(586) + 1
    np.testing.assert_array_equal(one[:length], other[:length])
    assert set(one[length:]) <= {parts.pad_token_id}


@pytest.mark.parametrize(
  "missing, message",
  [
    ("tokenizer_config.json", "holds no tokenizer_config.json"),
    ("vocab.json", "holds no tokenizer.json, no vocab.json with merges.txt and no spiece.model"),
    ("merges.txt", "holds no tokenizer.json, no vocab.json with merges.txt and no spiece.model"),
  ],
)
def test_a_tokenizer_without_its_words_is_refused(tmp_path, missing, message):
  directory = published_clip(tmp_path / "clip")
  (directory / missing).unlink()
  with pytest.raises(UserError, match=message):
    load_tokenizer(directory)


def test_sentencepiece_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  shutil.copy(TINY / "tokenizer_3/tokenizer_config.json", tmp_path)
  (tmp_path / "spiece.model").write_bytes(b"")
  with pytest.raises(UserError, match="spiece.model and no tokenizer.json; fetch tokenizer.json"):
    load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"model": 3}'])
def test_a_broken_tokenizer_is_one_sentence(tmp_path, text):
  shutil.copytree(TINY / "tokenizer", tmp_path, dirs_exist_ok=True)
  (tmp_path / "tokenizer.json").write_text(text)
  with pytest.raises(UserError, match="holds no usable tokenizer"):
    load_tokenizer(tmp_path)


def test_a_tokenizer_without_padding_is_refused(tmp_path):
  shutil.copytree(TINY / "tokenizer_3", tmp_path, dirs_exist_ok=True)
  settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
  settings = settings | {"pad_token": None, "tokenizer_class": "PreTrainedTokenizerFast"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  with pytest.raises(UserError, match="tokenizer_config.json names no pad_token"):
    load_tokenizer(tmp_path)


def test_an_id_beyond_the_embeddings_is_named():
  tokenizer = load_tokenizer(TINY / "tokenizer")
  ids = checked_ids(tokenizer, [[0, 586]], 587)
  assert ids.dtype == np.int32 and ids.tolist() == [[0, 586]]
  message = r"tiny/tokenizer: the token '<\|endoftext\|>' has the id 586, but .* has 586 embeddings"
  with pytest.raises(UserError, match=message):
    checked_ids(tokenizer, [[0, 586]], 586)


def load_text(directory):
  """The text encoders of a directory of Stable Diffusion 3."""
  read = partial(read_file, directory)
  return describe_sd3_text(directory, read, np.float32).load(directory)


@pytest.mark.parametrize("part, number", [("tokenizer", 587), ("tokenizer_3", 148)])
def test_every_text_encoder_knows_its_vocabulary(tmp_path, part, number):
  directory = shutil.copytree(TINY, tmp_path / "tiny")
  add_token(directory / part, number)
  text = load_text(directory)
  text.tokenize(["a red circle"])
  with pytest.raises(UserError, match=rf"{part}: the token '<style>' has the id {number}"):
    text.tokenize(["a <style> circle"])


def test_rewards_know_their_vocabulary(tmp_path):
  directory = shutil.copytree(TINY / "clip", tmp_path / "clip")
  add_token(directory, 587)
  with pytest.raises(UserError, match="clip: the token '<style>' has the id 587"):
    ClipScore.from_pretrained(directory).tokenize(["a <style> circle"])


def test_more_tokens_than_positions_are_refused(tmp_path):
  directory = shutil.copytree(TINY, tmp_path / "tiny")
  file = directory / "tokenizer_2/tokenizer_config.json"
  settings = json.loads(file.read_text())
  for length, shown in ((77, "77"), (None, r"1e\+30")):
    settings["model_max_length"] = length
    if length is None:
      del settings["model_max_length"]
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=rf"model_max_length is {shown}, but .* has 12 positions"):
      load_text(directory)


def test_prompts_that_an_encoder_cuts_are_counted_and_shown():
  limits = text_limits(TINY)
  kinds = [(limit.encoder, limit.length) for limit in limits]
  assert kinds == [("CLIP", 12), ("CLIP", 12), ("T5", 12)]
  fits, long = "a red circle", "a photo of a red circle left of a blue square and a green cross"
  assert cut_prompts(limits, [fits] * 3) == [] == cut_prompts(limits, [])
  clip, t5 = cut_prompts(limits, [fits, long, fits, "猫" * 40], "training prompts")
  first = f"are cut there; the first: {long!r}"
  assert clip == f"2 of 4 training prompts are longer than CLIP's 12 tokens and {first}"
  # To T5's tokenizer, letters that it does not know are one token.
  first = f"is cut there; the first: {long!r}"
  assert t5 == f"1 of 4 training prompts is longer than T5's 12 tokens and {first}"
  (one, _) = cut_prompts(limits, [fits, 30 * long])
  assert one.startswith("1 of 2 prompts is longer") and len(one) < 180 and one.endswith("…'")


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_3"])
def test_a_prompt_is_cut_where_its_ids_end_beyond_the_length(part):
  tokenizer = load_tokenizer(TINY / part)
  words = "a red circle, two BLUE squares & 3 crosses!? é 猫 xylophone".split()
  texts = [" ".join(words[i : i + n]) for i in range(len(words)) for n in range(12)]
  want = [i for i, ids in enumerate(map(tokenizer.encode, texts)) if len(ids) > 12]
  assert longer(Limit("", tokenizer, 12), texts) == want
  assert 10 < len(want) < len(texts) - 10


def test_of_very_many_prompts_some_are_looked_at(monkeypatch):
  monkeypatch.setattr("rtdmd_jax.pipeline.text._MOST_LOOKED_AT", 4)
  clip, _ = cut_prompts(sd3_limits(TINY), ["a red circle " * (1 + 9 * (i % 2)) for i in range(6)])
  assert clip.startswith("2 of 4 looked at of 6 prompts are longer")
