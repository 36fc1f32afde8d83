"""GenEval2's score, Soft-TIFA, over any model that answers questions with probabilities.

A prompt comes with questions and their answers (its `vqa_list`). The score of an image is the
geometric mean of the probabilities that a vision-language model begins its one-word answer as it
should (arXiv 2512.16853; constants as RTDMD uses them).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rtdmd_jax.datasets.prompts import load_prompts
from rtdmd_jax.errors import UserError

_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_YES = ("Yes", "yes", " Yes", " yes")
AGGREGATES = ("geometric", "arithmetic")


class Query(NamedTuple):
  """A question about image number `image`, and the ways to write its answer."""

  image: int
  question: str
  variants: tuple[str, ...]


# (uint8 images [B, H, W, 3], queries) -> for each query the probability of the first token of each
# of its variants; NaN for a query that failed. The model is to be asked `instruction(question)`.
Answerer = Callable[[np.ndarray, Sequence[Query]], Sequence[Sequence[float]]]


def instruction(question: str) -> str:
  """The question that follows the image."""
  return f"{question} Answer in one word."


def variants(question: str, answer: str) -> tuple[str, ...]:
  """The ways to write an answer whose first tokens count as right.

  A question that counts ("How many ...") is answered by its number as a word, small or capital, or
  in digits; every other question asks for a yes. Each with and without a leading space.
  """
  if not question.startswith("How many"):
    return _YES
  words = [answer, answer.capitalize()]
  if answer.lower() in _NUMBERS:
    words.append(str(_NUMBERS.index(answer.lower())))
  return tuple(space + word for space in ("", " ") for word in words)


def answer_probability(probabilities: Sequence[float]) -> float:
  """Sum over the variants of the probability of their first token.

  Variants that share a first token count it once each, as published, so that the sum may exceed the
  true probability, and even 1.
  """
  return float(np.sum(np.asarray(probabilities, np.float64)))


def aggregate(probabilities: Sequence[float], how: str = "geometric") -> float:
  """Mean of a prompt's answers: 0 if one is impossible (geometric), NaN without any."""
  values = np.asarray(probabilities, np.float64)
  if not values.size:
    return float("nan")
  if how == "arithmetic":
    return float(values.mean())
  with np.errstate(divide="ignore"):
    return float(np.exp(np.log(values).mean()))


class GenEval2:
  """GenEval2 as a reward: `scorer(images, prompts, metadata) -> [B] float32`.

  Questions come from the prompt's record (`vqa_list`), or else from the file `questions`. An image
  with a question that the answerer failed on is NaN, as is one without any question.
  """

  def __init__(
    self, answerer: Answerer, *, aggregate: str = "geometric", questions: str | None = None
  ):
    """Makes the reward.

    Args:
      answerer: the model that answers.
      aggregate: "geometric", as RTDMD scores, or "arithmetic".
      questions: a prompt file whose records hold `vqa_list`, for prompts without a record.

    Raises:
      UserError: another aggregate, a broken file, or one prompt with two lists of questions.
    """
    if aggregate not in AGGREGATES:
      raise UserError(f"geneval2: aggregate is {aggregate!r}; use one of {', '.join(AGGREGATES)}")
    self._answerer, self._aggregate = answerer, aggregate
    self._questions = {} if questions is None else read_questions(questions)

  def __call__(
    self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping] | None
  ) -> np.ndarray:
    """Scores uint8 images `[B, H, W, 3]`.

    Raises:
      UserError: a prompt without a list of questions, or a malformed one.
    """
    records = [{}] * len(prompts) if metadata is None else metadata
    pairs = [
      check_questions(p, r or {}, self._questions) for p, r in zip(prompts, records, strict=True)
    ]
    queries = [
      Query(i, question, variants(question, answer))
      for i, of_image in enumerate(pairs)
      for question, answer in of_image
    ]
    answers = self._answerer(images, queries) if queries else []
    values: list[list[float]] = [[] for _ in prompts]
    for query, probabilities in zip(queries, answers, strict=True):
      values[query.image].append(answer_probability(probabilities))
    return np.array([aggregate(v, self._aggregate) for v in values], np.float32)


Questions = Mapping[str, list[tuple[str, str]]]


def check_questions(prompt: str, record: Mapping, known: Questions) -> list[tuple[str, str]]:
  """The questions of a prompt and their answers: its record's `vqa_list`, or else those `known`.

  Raises:
    UserError: there are none, or they are malformed.
  """
  if "vqa_list" in record:
    return _check_pairs(record["vqa_list"], repr(prompt))
  if prompt not in known:
    raise UserError(
      f"geneval2 has no questions for the prompt {prompt!r}; use prompts with a vqa_list, or name"
      " a file of them with the option questions"
    )
  return known[prompt]


def _check_pairs(value: object, where: str) -> list[tuple[str, str]]:
  pairs = value if isinstance(value, list | tuple) else [None]
  for pair in pairs:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
      raise UserError(f"{where}: vqa_list must be a list of [question, answer]")
    if not all(isinstance(text, str) and text.strip() for text in pair):
      raise UserError(f"{where}: questions and answers must be text, got {list(pair)!r}")
  return [(question, answer) for question, answer in pairs]


def read_questions(path: str) -> dict[str, list[tuple[str, str]]]:
  """Questions and answers by prompt, from a prompt file whose records hold `vqa_list`.

  Raises:
    UserError: a missing or broken file, or one prompt with two lists of questions.
  """
  questions: dict[str, list[tuple[str, str]]] = {}
  for number, prompt in enumerate(load_prompts(path, split="test"), start=1):
    where = f"{path}, prompt {number}"
    pairs = _check_pairs(prompt.record.get("vqa_list"), where)
    if questions.setdefault(prompt.text, pairs) != pairs:
      raise UserError(f"{where}: {prompt.text!r} has other questions than before; keep one list")
  return questions
