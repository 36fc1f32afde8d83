"""Answers with probabilities from an OpenAI-compatible endpoint (vLLM, SGLang), for GenEval2."""

import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.host.geneval2 import Query, instruction
from rtdmd_jax.rewards.remote.client import DEFAULT, JsonClient, Retry, TransientError
from rtdmd_jax.rewards.remote.protocol import encode_image
from rtdmd_jax.weights.reward_files import local_option

_logger = logging.getLogger(__name__)


class OpenAIAnswerer:
  """Asks each question on its own, many at once, for one token and its likeliest alternatives.

  A token that is not among the `top` likeliest counts as impossible. Without the model's tokenizer
  a variant is taken to be one token, and one that the model would write in several counts for
  nothing; with it the first tokens are known, as in the published score.
  """

  def __init__(
    self,
    *,
    url: str,
    model: str,
    tokenizer: str | None = None,
    top: int = 20,
    concurrency: int = 32,
    token_env: str | None = None,
    timeout: float = DEFAULT.timeout,
    attempts: int = DEFAULT.attempts,
    backoff: float = DEFAULT.backoff,
  ):
    """Asks the endpoint whether it has the model.

    Args:
      url: of the endpoint, `http://host:port/v1`.
      model: the model's name there.
      tokenizer: the model's `tokenizer.json`, or the folder or repository that holds it.
      top: alternatives to ask for; 20 is the most that vLLM gives by default.
      concurrency: questions at once.
      token_env: name of the environment variable that holds the bearer token.
      timeout: seconds for one try.
      attempts: tries for each question.
      backoff: seconds before the second try; doubled before each further one, at most 30.

    Raises:
      UserError: a wrong option, no such endpoint, or it does not have the model.
    """
    if top < 1 or concurrency < 1:
      raise UserError("geneval2: top and concurrency must be positive")
    self._model, self._top, self._concurrency = model, top, concurrency
    self._tokenizer = None if tokenizer is None else _load_tokenizer(tokenizer)
    self._client = JsonClient(url, Retry(timeout, attempts, backoff), token_env=token_env)
    try:
      models = self._client.ask("/models", None, _read_models)
    except TransientError as error:
      raise UserError(f"the endpoint cannot be reached: {error}; is it running?") from error
    if model not in models:
      raise UserError(f"{url} does not serve {model!r}, only {', '.join(models) or 'nothing'}")

  def __call__(self, images: np.ndarray, queries: Sequence[Query]) -> list[list[float]]:
    """Probability of each variant's first token; NaN for a question that failed.

    Raises:
      UserError: the endpoint refuses the requests for good.
    """
    used = sorted({query.image for query in queries})
    with ThreadPoolExecutor(self._concurrency) as pool:
      encoded = dict(zip(used, pool.map(encode_image, (images[i] for i in used)), strict=True))
      return list(pool.map(lambda query: self._answer(encoded[query.image], query), queries))

  def _answer(self, image: str, query: Query) -> list[float]:
    content = [
      {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
      {"type": "text", "text": instruction(query.question)},
    ]
    request = {
      "model": self._model,
      "messages": [{"role": "user", "content": content}],
      "max_tokens": 1,
      "temperature": 0,
      "logprobs": True,
      "top_logprobs": self._top,
    }
    try:
      probabilities = self._client.ask("/chat/completions", request, read_probabilities)
    except TransientError as error:
      _logger.warning("geneval2: the question %r failed: %s", query.question, error)
      return [math.nan] * len(query.variants)
    return [probabilities.get(self._first_token(text), 0.0) for text in query.variants]

  def _first_token(self, text: str) -> str:
    if self._tokenizer is None:
      return text
    first = self._tokenizer.encode(text, add_special_tokens=False).ids[0]
    return self._tokenizer.decode([first], skip_special_tokens=False)


def read_probabilities(answer: object) -> dict[str, float]:
  """Probabilities by token from a chat completion of one token.

  Raises:
    TransientError: the answer has another form.
  """
  try:
    entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    probabilities = {entry["token"]: math.exp(entry["logprob"]) for entry in entries}
  except (KeyError, IndexError, TypeError, OverflowError) as error:
    raise TransientError("the answer holds no log-probabilities") from error
  if not probabilities or not all(
    isinstance(token, str) and p <= 1.001 for token, p in probabilities.items()
  ):
    raise TransientError("the answer's log-probabilities are no such")
  return probabilities


def _read_models(answer: object) -> list[str]:
  data = answer.get("data") if isinstance(answer, Mapping) else None
  if not isinstance(data, list) or not all(isinstance(entry, Mapping) for entry in data):
    raise TransientError("the answer to /models lists no models")
  return [str(entry.get("id")) for entry in data]


def _load_tokenizer(name: str):
  from tokenizers import Tokenizer

  path = Path(local_option("geneval2", "tokenizer", name))
  file = path / "tokenizer.json" if path.is_dir() else path
  try:
    return Tokenizer.from_file(str(file))
  except Exception as error:  # the library raises bare Exceptions
    raise UserError(f"geneval2: cannot read the tokenizer {file}: {error}") from error
