"""Text drawn in an image, read by RapidOCR, against the quoted text of its prompt.

The score is 1 minus an edit distance, as in Flow-GRPO and RTDMD. The models are RapidOCR's own
(PP-OCR, inside its wheel, nothing is downloaded), not the published PaddleOCR: scores compare, but
are not identical.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime.extras import missing

# uint8 image [H, W, 3] -> the pieces of text found in it, in reading order.
Reader = Callable[[np.ndarray], Sequence[str]]
_logger = logging.getLogger(__name__)


def target_text(prompt: str) -> str | None:
  """The text that the image is to show: the first span in double quotes; None without one."""
  parts = prompt.split('"')
  return _plain(parts[1]) or None if len(parts) > 1 else None


def _plain(text: str) -> str:
  return text.replace(" ", "").lower()


def edit_distance(first: str, second: str) -> int:
  """Levenshtein's distance."""
  row = list(range(len(second) + 1))
  for i, a in enumerate(first, start=1):
    above, row[0] = row[0], i
    for j, b in enumerate(second, start=1):
      above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
  return row[-1]


def text_score(pieces: Sequence[str], target: str) -> float:
  """`1 - min(d, n) / n` in [0, 1] for a target of n characters.

  Case and spaces do not count. d is 0 if the pieces, joined, contain the target, and otherwise
  their edit distance to it; nothing found scores 0.

  Args:
    pieces: the text found.
    target: from `target_text`.
  """
  text = _plain("".join(pieces))
  if target in text:
    return 1.0
  return 1.0 - min(edit_distance(text, target), len(target)) / len(target)


def rapidocr_reader() -> Reader:
  """RapidOCR for upright text, on one thread; drops pieces of a confidence below .5.

  Raises:
    UserError: it is not installed.
  """
  try:
    from rapidocr import RapidOCR
  except ImportError as error:
    raise missing("reward 'ocr'", error, "ocr") from error
  engine = RapidOCR(
    params={
      "Global.use_cls": False,
      "Global.text_score": 0.5,
      "Global.log_level": "error",
      "EngineConfig.onnxruntime.intra_op_num_threads": 1,
      "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
  )

  def read(image: np.ndarray) -> Sequence[str]:
    return engine(np.ascontiguousarray(image[..., ::-1])).txts or ()  # it expects BGR

  return read


class OCR:
  """Drawn text as a reward: `scorer(images, prompts, metadata) -> [B] float32`.

  NaN where the prompt quotes nothing, or reading failed; an image without text scores 0.
  """

  def __init__(self, *, workers: int | None = None, reader: Callable[[], Reader] | None = None):
    """Builds the readers.

    Args:
      workers: images read at once; by default one for each processor, at most 16.
      reader: makes one reader a worker; RapidOCR's by default.

    Raises:
      UserError: RapidOCR is missing, or `workers` is not positive.
    """
    workers = min(os.cpu_count() or 1, 16) if workers is None else workers
    if workers < 1:
      raise UserError(f"reward 'ocr': workers is {workers}; use at least 1")
    self._readers = [(reader or rapidocr_reader)() for _ in range(workers)]

  def __call__(
    self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping] | None
  ) -> np.ndarray:
    """Scores uint8 images `[B, H, W, 3]`."""
    del metadata
    targets = [target_text(prompt) for prompt in prompts]
    scores = np.full(len(images), np.nan, np.float32)
    rows = [i for i, target in enumerate(targets) if target is not None]

    def work(number: int) -> None:
      # Every reader has its own share of the images, because an engine serves one thread.
      for i in rows[number :: len(self._readers)]:
        scores[i] = self._score(self._readers[number], images[i], targets[i])

    with ThreadPoolExecutor(len(self._readers)) as pool:
      list(pool.map(work, range(len(self._readers))))
    return scores

  def _score(self, read: Reader, image: np.ndarray, target: str) -> float:
    try:
      return text_score(read(image), target)
    except Exception as error:  # whatever an engine raises costs this image alone
      _logger.warning("reward ocr failed on an image: %s: %s", type(error).__name__, error)
      return float("nan")
