"""GenEval's rule for "A is left of / right of / above / below B" (arXiv 2310.11513)."""

import numpy as np

POSITION_THRESHOLD = 0.1
RELATION_VECTORS = {
  "left of": (-1.0, 0.0),
  "right of": (1.0, 0.0),
  "above": (0.0, -1.0),
  "below": (0.0, 1.0),
}


def direction(box: np.ndarray, other: np.ndarray) -> np.ndarray:
  """Direction from `other` to `box`, zero along an axis where the two are hardly apart.

  The offset of the centres is shrunk per axis by 0.1 times the sum of the two extents, then
  divided by the length of the unshrunk offset.

  Args:
    box: `[..., 4]` as `(x0, y0, x1, y1)`, y downwards.
    other: `[..., 4]`.

  Returns:
    `[..., 2]` float64 as (right, down), each in [-1, 1].
  """
  box, other = np.asarray(box, np.float64), np.asarray(other, np.float64)
  offset = (box[..., :2] + box[..., 2:] - other[..., :2] - other[..., 2:]) / 2
  extent = np.abs(box[..., 2:] - box[..., :2]) + np.abs(other[..., 2:] - other[..., :2])
  shrunk = np.maximum(np.abs(offset) - POSITION_THRESHOLD * extent, 0.0) * np.sign(offset)
  shrunk = np.where(np.all(np.abs(shrunk) < 1e-3, -1, keepdims=True), 0.0, shrunk)
  length = np.linalg.norm(offset, axis=-1, keepdims=True)
  return shrunk / np.where(length > 0, length, 1.0)


def relations(box: np.ndarray, other: np.ndarray) -> set[str]:
  """The relations that hold for `box` seen from `other` (each `[4]`): none, one or two."""
  vector = direction(box, other)
  return {name for name, axis in RELATION_VECTORS.items() if float(np.dot(vector, axis)) > 0.5}
