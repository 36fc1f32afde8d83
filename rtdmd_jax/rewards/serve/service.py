"""A reward service apart from HTTP: from requests to answers."""

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.multi import Reward
from rtdmd_jax.rewards.process import contained
from rtdmd_jax.rewards.remote import protocol

_logger = logging.getLogger(__name__)


class Limits(NamedTuple):
  """The limits of a service: bytes of a body, images of a request, pixels of an image, requests at
  once, and seconds without progress before a connection is given up.
  """

  body: int = 256 * 2**20
  images: int = 256
  pixels: int = 4096 * 4096
  requests: int = 16
  idle: float = 60.0


LIMITS = Limits()


class TooMany(ValueError):
  """More images than the service accepts in one request."""


class Service:
  """Scores the images of requests, a reward at a time; safe to use from several threads."""

  def __init__(self, rewards: Mapping[str, Reward], limits: Limits = LIMITS):
    self._rewards = dict(rewards)
    self._locks = {name: threading.Lock() for name in rewards}
    self._count_lock = threading.Lock()
    self._counts: Counter[tuple[str, str, str]] = Counter()
    self.limits = limits

  @property
  def names(self) -> list[str]:
    """Names of the rewards."""
    return list(self._rewards)

  def score(self, body: object) -> dict:
    """The answer to the body of `POST /score`; a failure stays with its image and reward.

    Raises:
      BadMessage: the body does not follow the protocol.
      TooMany: more images than the limit.
    """
    items = protocol.read_requests(body, self.names)
    if len(items) > self.limits.images:
      raise TooMany(f"{len(items)} images, but at most {self.limits.images} in one request")
    results: list[dict] = [{} for _ in items]
    errors: list[dict] = [{} for _ in items]
    images: dict[int, np.ndarray] = {}
    for i, item in enumerate(items):
      try:
        images[i] = protocol.decode_image(item.image_b64, self.limits.pixels)
      except protocol.BadMessage as error:
        errors[i] = {name: str(error) for name in item.rewards}
    for name, rows in _groups(items, images):
      outcome = self._run(name, [images[i] for i in rows], [items[i] for i in rows])
      for i, value in zip(rows, outcome, strict=True):
        if isinstance(value, str):
          errors[i][name] = value
        else:
          results[i][name] = value
    for name in self.names:
      self.count("failed_images_total", "reward", name, sum(name in e for e in errors))
    return {"results": results, "errors": errors}

  def _run(
    self, name: str, images: list[np.ndarray], items: Sequence[protocol.Item]
  ) -> list[dict[str, float] | str]:
    """Metrics, or the reason why there are none, of images of one size."""
    records = [item.metadata or {"prompt": item.text} for item in items]
    start = time.monotonic()
    try:
      with self._locks[name]:
        prompts = [item.text for item in items]
        result = contained(self._rewards[name], np.stack(images), prompts, records)
      return _metrics(name, result, len(images))
    except UserError as error:
      if len(images) == 1:
        return [str(error)]
      # One bad record must not cost the others their scores.
      return [self._run(name, [im], [it])[0] for im, it in zip(images, items, strict=True)]
    except Exception as error:
      _logger.exception("reward %s failed on %d images", name, len(images))
      return [f"{type(error).__name__}: {error}"] * len(images)
    finally:
      self.count("images_total", "reward", name, len(images))
      self.count("seconds_total", "reward", name, time.monotonic() - start)

  def count(self, metric: str, label: str, value: str, amount: float = 1) -> None:
    """Adds to a counter of the metrics page."""
    with self._count_lock:
      self._counts[metric, label, value] += amount

  def metrics_page(self) -> str:
    """All counters in Prometheus' text format."""
    with self._count_lock:
      counts = sorted(self._counts.items())
    lines, last = [], None
    for (metric, label, value), amount in counts:
      if metric != last:
        lines.append(f"# TYPE rtdmd_reward_{metric} counter")
        last = metric
      value = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
      lines.append(f'rtdmd_reward_{metric}{{{label}="{value}"}} {amount:.10g}')
    return "\n".join([*lines, ""])


def _groups(
  items: Sequence[protocol.Item], images: Mapping[int, np.ndarray]
) -> list[tuple[str, list[int]]]:
  """Rows that a reward can take as one array: the same reward and image size."""
  groups = defaultdict(list)
  for i, image in images.items():
    for name in items[i].rewards:
      groups[name, image.shape].append(i)
  return [(name, rows) for (name, _), rows in groups.items()]


def _metrics(name: str, result: object, count: int) -> list[dict[str, float] | str]:
  """A reward's output, image by image; the reason instead where its own score is not finite."""
  outputs = dict(result) if isinstance(result, Mapping) else {name: result}
  columns = {key: np.asarray(values, np.float64) for key, values in outputs.items()}
  if name not in columns or any(column.shape != (count,) for column in columns.values()):
    raise ValueError(
      f"returns outputs {sorted(outputs)} of a wrong shape or name for {count} images"
    )
  rows = [{key: float(column[i]) for key, column in columns.items()} for i in range(count)]
  return [
    {key: value for key, value in row.items() if np.isfinite(value)}
    if np.isfinite(row[name])
    else "the image could not be scored"
    for row in rows
  ]
