"""Tokenizers for a pipeline trained from scratch, in the formats of CLIP and T5."""

import json
import math
import string
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, trainers

ASCII = [chr(code) for code in range(33, 127)]
ASCII_LOWER = string.ascii_lowercase
CLIP_BOS, CLIP_EOS = "<|startoftext|>", "<|endoftext|>"


def train_clip_tokenizer(captions: list[str], directory: Path, *, max_length: int) -> int:
  """Trains byte-pair encoding in CLIP's format and writes it; returns the vocabulary size.

  The byte alphabet is complete, so any prompt encodes without unknown tokens.
  """
  from transformers import CLIPTokenizer

  trainer = FastTokenizer(models.BPE(end_of_word_suffix="</w>"))
  trainer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
  )
  trainer.train_from_iterator(
    [caption.lower() for caption in captions],
    trainers.BpeTrainer(
      vocab_size=1024,
      min_frequency=1,
      end_of_word_suffix="</w>",
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
      show_progress=False,
    ),
  )
  trained = FastTokenizer.from_str(trainer.to_str())
  vocabulary = trained.get_vocab()
  # Every byte also needs its end-of-word form, as in CLIP's own vocabulary.
  for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
    vocabulary.setdefault(byte + "</w>", len(vocabulary))
  vocabulary[CLIP_BOS] = len(vocabulary)
  vocabulary[CLIP_EOS] = len(vocabulary)
  merges = _merges(trained)
  tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)
  tokenizer.save_pretrained(str(directory))
  return len(vocabulary)


def train_t5_tokenizer(captions: list[str], directory: Path, *, max_length: int) -> int:
  """Builds a unigram model in T5's format and writes it; returns the vocabulary size.

  Each word of the captions is one piece scored by its log-frequency; single characters, far less
  likely, spell everything else (the unigram trainer splits words that a small corpus has once).
  """
  from transformers import T5Tokenizer

  counts = Counter(word for caption in captions for word in caption.lower().split())
  total = sum(counts.values())
  vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
  vocabulary += [
    (f"▁{word}", math.log(count / total)) for word, count in sorted(counts.items()) if len(word) > 1
  ]
  vocabulary += [(f"▁{char}", -10.0) for char in ASCII_LOWER]
  vocabulary += [(char, -20.0) for char in ["▁", *ASCII]]
  tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=max_length)
  tokenizer.save_pretrained(str(directory))
  return len(vocabulary)


def _merges(tokenizer: FastTokenizer) -> list[tuple[str, str]]:
  return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
