"""Messages of the JSON reward service, for both ends.

`POST /score` takes `{"requests": [{"history": [{"text", "image_b64"}], "required_rewards": [name],
"metadata": {...} | null}]}` and answers `{"results": [{name: {metric: number}}], "errors": [{name:
text}]}`, each list in the order of the requests: the protocol of Tencent's UniRL reward service.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

FORMATS = ("png", "jpeg")
_READ_FORMATS = ("PNG", "JPEG", "WEBP")
_LARGEST = 3e38  # of float32, about


class BadMessage(ValueError):
  """A message that does not follow the protocol."""


class Item(NamedTuple):
  """One image to score; only the last turn of its history counts."""

  text: str
  image_b64: str
  rewards: tuple[str, ...]
  metadata: dict | None


def encode_image(image: np.ndarray, image_format: str = "png") -> str:
  """A uint8 image `[H, W, 3]` as base64; PNG is exact, JPEG (quality 95) smaller."""
  buffer = io.BytesIO()
  # Level 1 is several times faster than the default, and hardly larger on photographs.
  options = {"compress_level": 1} if image_format == "png" else {"quality": 95, "subsampling": 0}
  Image.fromarray(image).save(buffer, format=image_format, **options)
  return base64.b64encode(buffer.getvalue()).decode("ascii")


def decode_image(text: str, max_pixels: int) -> np.ndarray:
  """The reverse of `encode_image`: uint8 `[H, W, 3]`.

  Raises:
    BadMessage: not base64, not a PNG, JPEG or WebP, or more than `max_pixels` pixels.
  """
  try:
    with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=_READ_FORMATS) as im:
      if im.width * im.height > max_pixels:
        raise BadMessage(f"image of {im.width} x {im.height} has more than {max_pixels} pixels")
      return np.asarray(im.convert("RGB"))
  except BadMessage:
    raise
  # Pillow's readers let many kinds through, struct.error and ValueError among them.
  except Exception as error:
    raise BadMessage(f"image_b64 is no readable image ({type(error).__name__})") from error


def request(text: str, image_b64: str, reward: str, metadata: Mapping | None) -> dict:
  """One entry of `requests`."""
  return {
    "history": [{"text": text, "image_b64": image_b64}],
    "required_rewards": [reward],
    "metadata": None if metadata is None else dict(metadata),
  }


def read_requests(body: object, known: Sequence[str]) -> list[Item]:
  """Checks the body of `POST /score`.

  Raises:
    BadMessage: naming the entry that is wrong, or a reward that is not in `known`.
  """
  entries = body.get("requests") if isinstance(body, Mapping) else None
  if not isinstance(entries, list):
    raise BadMessage("the body must be an object with a list under 'requests'")
  return [_item(entry, f"requests[{i}]", known) for i, entry in enumerate(entries)]


def _item(entry: object, where: str, known: Sequence[str]) -> Item:
  if not isinstance(entry, Mapping):
    raise BadMessage(f"{where} must be an object")
  history, rewards = entry.get("history"), entry.get("required_rewards")
  turn = history[-1] if isinstance(history, list) and history else None
  if not isinstance(turn, Mapping) or not isinstance(turn.get("text"), str):
    raise BadMessage(f"{where}: the last turn of 'history' needs a string under 'text'")
  if not isinstance(turn.get("image_b64"), str):
    raise BadMessage(f"{where}: the last turn of 'history' needs a string under 'image_b64'")
  if not isinstance(rewards, list) or not rewards:
    raise BadMessage(f"{where}: 'required_rewards' must be a list of names")
  for name in rewards:
    if name not in known:
      raise BadMessage(f"{where}: unknown reward {name!r}; this service has {', '.join(known)}")
  metadata = entry.get("metadata")
  if metadata is not None and not isinstance(metadata, dict):
    raise BadMessage(f"{where}: 'metadata' must be an object or null")
  return Item(turn["text"], turn["image_b64"], tuple(dict.fromkeys(rewards)), metadata)


def read_results(answer: object, reward: str, count: int) -> tuple[list[dict[str, float]], str]:
  """Checks the answer to `count` requests of one reward.

  Returns:
    The metrics of each request, NaN where not finite and empty for one that failed, and one of the
    errors or "".

  Raises:
    BadMessage: the answer does not follow the protocol, so none of it can be trusted.
  """
  if not isinstance(answer, Mapping):
    raise BadMessage("the answer is not an object")
  results, errors = answer.get("results"), answer.get("errors", [{}] * count)
  for value in (results, errors):
    if not isinstance(value, list) or len(value) != count:
      raise BadMessage(f"the answer does not hold {count} results")
    if not all(isinstance(entry, Mapping) for entry in value):
      raise BadMessage("the answer's results and errors must be objects")
  metrics = [
    {} if reward in e else _metrics(r.get(reward, {})) for r, e in zip(results, errors, strict=True)
  ]
  texts = [str(entry[reward]) for entry in errors if reward in entry]
  return metrics, texts[0] if texts else ""


def _metrics(values: object) -> dict[str, float]:
  if not isinstance(values, Mapping):
    raise BadMessage(f"metrics must be an object, got {type(values).__name__}")
  for name, value in values.items():
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
      raise BadMessage(f"metric {name!r} is no number")
  return {name: _finite_or_nan(value) for name, value in values.items()}


def _finite_or_nan(value: float | None) -> float:
  return float(value) if value is not None and abs(value) <= _LARGEST else math.nan
