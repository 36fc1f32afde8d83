"""A reward that another machine computes, over the JSON protocol of `protocol.py`."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.remote import protocol
from rtdmd_jax.rewards.remote.client import DEFAULT, JsonClient, Retry, TransientError

_logger = logging.getLogger(__name__)


class RemoteReward:
  """Scores images at a reward service: `reward(images, prompts, metadata) -> {output: [B]}`.

  Images go in chunks, several at a time. A sample whose score the service does not give, or gives
  in a form that cannot be trusted, is asked for again; after the last try it is NaN.
  """

  def __init__(
    self,
    name: str,
    *,
    url: str,
    reward: str | None = None,
    metric: str | None = None,
    extra_metrics: Sequence[str] = (),
    chunk: int = 16,
    concurrency: int = 4,
    image_format: str = "png",
    token_env: str | None = None,
    timeout: float = DEFAULT.timeout,
    attempts: int = DEFAULT.attempts,
    backoff: float = DEFAULT.backoff,
  ):
    """Asks the service whether it has the reward.

    Args:
      name: of the reward here; the name of its output.
      url: of the service, `http://host:port`.
      reward: its name at the service; `name` by default.
      metric: which of its metrics is the score; by default the one called like the reward, or else
        its only one.
      extra_metrics: metrics to return besides, under their own names.
      chunk: images a request.
      concurrency: requests at once.
      image_format: "png", which is exact, or "jpeg", which is smaller.
      token_env: name of the environment variable that holds the bearer token.
      timeout: seconds for one try.
      attempts: tries for each chunk.
      backoff: seconds before the second try; doubled before each further one, at most 30.

    Raises:
      UserError: a wrong option, the service cannot be reached, or it does not have the reward.
    """
    if chunk < 1 or concurrency < 1:
      raise UserError(f"reward {name!r}: chunk and concurrency must be positive")
    if image_format not in protocol.FORMATS:
      raise UserError(f"reward {name!r}: image_format is {image_format!r}; use png or jpeg")
    self.name, self.reward, self.metric = name, reward or name, metric
    self._extra = tuple(extra_metrics)
    self._chunk, self._concurrency, self._format = chunk, concurrency, image_format
    self.last_failure = ""  # why the newest score that is missing is missing
    self._client = JsonClient(url, Retry(timeout, attempts, backoff), token_env=token_env)
    try:
      offered = self._client.ask("/rewards", None, _read_offer)
    except TransientError as error:
      raise UserError(f"the reward service cannot be reached: {error}; is it running?") from error
    if self.reward not in offered:
      raise UserError(
        f"{self._client.url} does not serve {self.reward!r}, only {', '.join(offered) or 'nothing'}"
      )

  def __call__(
    self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping] | None
  ) -> dict[str, np.ndarray]:
    """Scores uint8 images `[B, H, W, 3]`; NaN where the service failed.

    Raises:
      UserError: the service refuses the requests for good, for example for a wrong token.
    """
    self.last_failure = ""
    records = [None] * len(images) if metadata is None else metadata
    starts = range(0, len(images), self._chunk)

    def score(start: int) -> list[dict[str, float]]:
      rows = slice(start, start + self._chunk)
      return self._score_chunk(images[rows], prompts[rows], records[rows])

    with ThreadPoolExecutor(self._concurrency) as pool:
      found = [metrics for part in pool.map(score, starts) for metrics in part]
    outputs = {self.name: np.array([self._main(metrics) for metrics in found], np.float32)}
    for key in self._extra:
      outputs[key] = np.array([metrics.get(key, np.nan) for metrics in found], np.float32)
    return outputs

  def _score_chunk(self, images, prompts, records) -> list[dict[str, float]]:
    """Metrics of each image, empty where every try failed."""
    outputs: list[dict[str, float]] = [{} for _ in images]
    requests = [
      protocol.request(prompt, protocol.encode_image(image, self._format), self.reward, record)
      for image, prompt, record in zip(images, prompts, records, strict=True)
    ]
    missing, reason = list(range(len(requests))), ""
    for _ in self._client.tries():
      try:
        answer = self._client.once("/score", {"requests": [requests[i] for i in missing]})
        parts, reason = protocol.read_results(answer, self.reward, len(missing))
      except (TransientError, protocol.BadMessage) as error:
        reason = str(error)
        continue
      for i, metrics in zip(missing, parts, strict=True):
        outputs[i] = metrics
      missing = [i for i in missing if np.isnan(self._main(outputs[i]))]
      if not missing:
        return outputs
    self.last_failure = reason
    _logger.warning("reward %s: %d images failed: %s", self.name, len(missing), reason)
    return outputs

  def _main(self, metrics: Mapping[str, float]) -> float:
    """The score among a sample's metrics; NaN without any.

    Raises:
      UserError: there are several and none is chosen, or the chosen one is not there.
    """
    if not metrics:
      return np.nan
    if self.metric is None and self.reward not in metrics and len(metrics) == 1:
      return next(iter(metrics.values()))
    wanted = self.metric or self.reward
    if wanted not in metrics:
      raise UserError(
        f"{self._client.url}: reward {self.reward!r} has no metric {wanted!r}; set the option"
        f" metric to one of {', '.join(sorted(metrics))}"
      )
    return metrics[wanted]


def _read_offer(answer: object) -> list[str]:
  names = answer.get("rewards") if isinstance(answer, Mapping) else None
  if not isinstance(names, list | dict) or not all(isinstance(name, str) for name in names):
    raise TransientError("the answer to /rewards lists no rewards")
  return list(names)
