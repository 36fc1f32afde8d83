"""Finds coloured shapes in images of the shapes set, without a learned model.

Pixels are assigned to palette colours by their direction away from the grey background, which an
anti-aliased or blurred edge shares with its shape. Every connected patch of one colour is compared
with each shape drawn at the patch's own centroid and area (both survive blur); the overlap becomes
the confidence, so smears, halves and merged shapes score low.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from rtdmd_jax.datasets.shapes.draw import CROSS_ARM, PALETTE, coverage
from rtdmd_jax.datasets.shapes.grammar import COLORS, SHAPES
from rtdmd_jax.rewards.host.geneval import Detection

# Area of a shape over the squared half side of its box; depth of its centroid below the centre of
# the box, in half sides.
_AREA = {
  "circle": np.pi,
  "square": 4.0,
  "triangle": 2.0,
  "cross": 8 * CROSS_ARM - 4 * CROSS_ARM**2,
}
_CENTROID = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3, "cross": 0.0}
_CHUNK = 64
_MIN_AREA = 40.0  # pixels; the smallest shape drawn covers 100
_MIN_CONTRAST = 38.0  # distance from the background, in 8-bit RGB units
_MIN_ALPHA = 0.22
_MIN_GREY, _MAX_GREY_SPREAD = 150.0, 45.0
# Overlap (soft intersection over union) of no and of full confidence.
_WORTHLESS, _SURE = 0.70, 0.86
# Distance of a patch's core from its palette colour, of full and of no confidence.
_NEAR_COLOR, _FAR_COLOR = 60.0, 120.0


class _Pixels(NamedTuple):
  """The foreground as a flat list: patch number, place, coverage and colour of each pixel."""

  patch: np.ndarray
  x: np.ndarray
  y: np.ndarray
  alpha: np.ndarray
  rgb: np.ndarray


def _background(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Median colour of the frame's rim `[B, 3]`, and whether that is a light grey `[B]`."""
  sides = [images[:, 0], images[:, -1], images[:, 1:-1, 0], images[:, 1:-1, -1]]
  color = np.median(np.concatenate(sides, axis=1), axis=1)
  light = (color.min(-1) >= _MIN_GREY) & (np.ptp(color, axis=-1) <= _MAX_GREY_SPREAD)
  # A frame that is rejected may have a palette colour; any grey keeps its arithmetic finite.
  return np.where(light[:, None], color, 255.0), light


def _segment(images: np.ndarray) -> tuple[_Pixels, np.ndarray, np.ndarray]:
  """Splits `[B, H, W, 3]` into patches; returns pixels, image and colour index of each patch."""
  background, light = _background(images)
  offset = images - background[:, None, None]
  rays = np.asarray([PALETTE[c] for c in COLORS], np.float32) - background[:, None]
  length = np.linalg.norm(rays, axis=-1)  # [B, K]
  batch, height, width, _ = images.shape
  along = offset.reshape(batch, -1, 3) @ np.swapaxes(rays / length[..., None], 1, 2)
  nearest = along.argmax(-1)  # [B, H * W]
  alpha = along.max(-1) / np.take_along_axis(length, nearest, 1)
  contrast = np.linalg.norm(offset, axis=-1).reshape(batch, -1)
  visible = (contrast > _MIN_CONTRAST) & (alpha > _MIN_ALPHA) & light[:, None]
  planes = (nearest[:, None] == np.arange(len(COLORS))[:, None]) & visible[:, None]
  structure = np.zeros((3, 3, 3, 3), bool)
  structure[1, 1] = ndimage.generate_binary_structure(2, 1)
  labels, count = ndimage.label(planes.reshape(batch, -1, height, width), structure)
  b, k, y, x = np.nonzero(labels)
  patch = labels[b, k, y, x] - 1
  image_of, color_of = np.zeros(count, int), np.zeros(count, int)
  image_of[patch], color_of[patch] = b, k
  covered = np.clip(alpha.reshape(batch, height, width)[b, y, x], 0.0, 1.0)
  return _Pixels(patch, x + 0.5, y + 0.5, covered, images[b, y, x]), image_of, color_of


def _without_specks(pixels: _Pixels, image_of: np.ndarray, color_of: np.ndarray):
  """Drops patches smaller than any shape and numbers the rest anew."""
  kept = np.bincount(pixels.patch, pixels.alpha, len(image_of)) >= _MIN_AREA
  number = np.cumsum(kept) - 1
  rows = kept[pixels.patch]
  pixels = _Pixels(*(column[rows] for column in pixels))
  return pixels._replace(patch=number[pixels.patch]), image_of[kept], color_of[kept]


def _mean(pixels: _Pixels, values: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
  total = np.bincount(pixels.patch, weights, count)
  return np.bincount(pixels.patch, weights * values, count) / total


def _overlaps(pixels: _Pixels, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Soft IoU `[N, shapes]` and box `[N, shapes, 4]` of every shape fitted to every patch.

  The fitted shape has the area of the patch, so its part outside the patch follows from the part
  inside, and only foreground pixels are visited.
  """
  core = _mean(pixels, pixels.alpha, pixels.alpha**3, count)
  alpha = np.minimum(pixels.alpha / core[pixels.patch], 1.0)  # pale patches are shapes too
  area = np.bincount(pixels.patch, alpha, count)
  center_x = _mean(pixels, pixels.x, alpha, count)
  center_y = _mean(pixels, pixels.y, alpha, count)
  overlap, boxes = np.empty((count, len(SHAPES))), np.empty((count, len(SHAPES), 4))
  for index, name in enumerate(SHAPES):
    radius = np.sqrt(area / _AREA[name])
    middle = center_y - _CENTROID[name] * radius
    x, y = pixels.x - center_x[pixels.patch], pixels.y - middle[pixels.patch]
    drawn = coverage(name, x, y, radius[pixels.patch])
    shared = np.bincount(pixels.patch, np.minimum(alpha, drawn), count)
    overlap[:, index] = shared / (2 * area - shared)
    boxes[:, index] = np.stack(
      [center_x - radius, middle - radius, center_x + radius, middle + radius], -1
    )
  return overlap, boxes


def _detect_chunk(images: np.ndarray) -> list[list[Detection]]:
  pixels, image_of, color_of = _without_specks(*_segment(images.astype(np.float32)))
  detections: list[list[Detection]] = [[] for _ in images]
  count = len(image_of)
  if not count:
    return detections
  overlap, boxes = _overlaps(pixels, count)
  best = overlap.argmax(1)
  shape_score = np.clip((overlap.max(1) - _WORTHLESS) / (_SURE - _WORTHLESS), 0.0, 1.0)
  weights = pixels.alpha**3
  core = np.stack([_mean(pixels, pixels.rgb[:, c], weights, count) for c in range(3)], -1)
  palette = np.asarray([PALETTE[c] for c in COLORS], np.float64)[color_of]
  distance = np.linalg.norm(core - palette, axis=-1)
  color_score = np.clip((_FAR_COLOR - distance) / (_FAR_COLOR - _NEAR_COLOR), 0.0, 1.0)
  score = shape_score * color_score
  for n in np.flatnonzero(score > 0):
    box = tuple(float(value) for value in boxes[n, best[n]])
    detections[image_of[n]].append(
      Detection(SHAPES[best[n]], box, float(score[n]), COLORS[color_of[n]])
    )
  return detections


def detect_shapes(images: np.ndarray) -> list[list[Detection]]:
  """Detects the shapes of every image; a detector for `rewards.geneval.GenEval`.

  Args:
    images: uint8 `[B, H, W, 3]`, shapes of about 15 to 30 pixels on a light grey background.
      An image whose rim is dark or coloured yields nothing.

  Returns:
    Per image, its detections in no particular order, with colour and sub-pixel box.

  Raises:
    ValueError: the images are not uint8 `[B, H, W, 3]`.
  """
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(f"images must be uint8 [B, H, W, 3], got {images.dtype} {images.shape}")
  detections: list[list[Detection]] = []
  for start in range(0, len(images), _CHUNK):
    detections += _detect_chunk(images[start : start + _CHUNK])
  return detections
