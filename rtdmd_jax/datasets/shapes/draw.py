"""Draws the scene of a record: light grey background, anti-aliased shapes, exact ground truth."""

from typing import NamedTuple

import numpy as np

from rtdmd_jax.datasets.relations import RELATION_VECTORS, direction
from rtdmd_jax.datasets.shapes.grammar import COLORS, SHAPES

SIZE = 64
PALETTE = {
  "red": (215, 25, 30),
  "yellow": (245, 210, 25),
  "green": (30, 160, 60),
  "blue": (30, 70, 220),
  "pink": (255, 105, 180),
  "black": (18, 18, 18),
}
BACKGROUND = (212, 240)
COLOR_JITTER = 8
# Contrast of washed-out images.
WASHED_OUT = (0.2, 0.3)
CROSS_ARM = 0.36
# A shape lies somewhere in a quarter of the image of its own.
_CELLS = np.array([[16.0, 16.0], [48.0, 16.0], [16.0, 48.0], [48.0, 48.0]])
_RADIUS = (10.0, 13.0)
_MARGIN = 1.5  # pixels between a shape's box and the border of its quarter
_CANDIDATES = 48
# GenEval asks for 0.5; scenes keep away from that border, so that a box measured one pixel off
# still shows the relation of the caption, and only that one.
_CLEAR_RELATION, _NO_RELATION = 0.62, 0.4


class Shape(NamedTuple):
  """One drawn shape: class, colour name and box `(x0, y0, x1, y1)` in pixels."""

  name: str
  color: str
  box: tuple[float, float, float, float]


def inside_distance(name: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
  """Signed distance to the edge of a shape that fills the box `[-radius, radius]^2`, in pixels.

  Args:
    name: one of `SHAPES`.
    x: horizontal offset from the centre of the box, in pixels; any shape.
    y: vertical offset, downwards; broadcasts with `x`.
    radius: half of the side of the box, in pixels; broadcasts.

  Returns:
    Positive inside, negative outside (a lower bound of the distance at the corners).
  """
  in_box = radius - np.maximum(np.abs(x), np.abs(y))
  if name == "square":
    return in_box
  if name == "triangle":  # upright, base at the bottom
    return np.minimum(in_box, ((y + radius) / 2 - np.abs(x)) * (2 / np.sqrt(5)))
  if name == "cross":
    return np.minimum(in_box, CROSS_ARM * radius - np.minimum(np.abs(x), np.abs(y)))
  if name == "circle":
    return radius - np.sqrt(x * x + y * y)
  raise ValueError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}")


def coverage(name: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
  """Share of a pixel centred at `(x, y)` that the shape covers, in [0, 1]."""
  return np.clip(inside_distance(name, x, y, radius) + 0.5, 0.0, 1.0)


def _related(low: np.ndarray, high: np.ndarray, subject: int, other: int, relation: str):
  vectors = direction(
    np.concatenate([low[:, subject], high[:, subject]], -1),
    np.concatenate([low[:, other], high[:, other]], -1),
  )
  wanted = vectors @ np.asarray(RELATION_VECTORS[relation], np.float64)
  across = np.abs(vectors @ np.asarray(RELATION_VECTORS[relation][::-1], np.float64))
  return (wanted > _CLEAR_RELATION) & (across < _NO_RELATION)


def _layout(count: int, constraints: list[tuple[int, int, str]], rng: np.random.Generator):
  """Centres `[count, 2]` and radii `[count]`, each in a quarter of its own, relations obeyed."""
  while True:
    radius = rng.uniform(*_RADIUS, (_CANDIDATES, count, 1))
    cells = rng.permuted(np.tile(np.arange(len(_CELLS)), (_CANDIDATES, 1)), axis=1)[:, :count]
    room = SIZE / 4 - _MARGIN - radius
    center = _CELLS[cells] + room * rng.uniform(-1.0, 1.0, (_CANDIDATES, count, 2))
    low, high = center - radius, center + radius
    valid = np.ones(_CANDIDATES, bool)
    for constraint in constraints:
      valid &= _related(low, high, *constraint)
    if valid.any():
      first = int(valid.argmax())
      return center[first], radius[first, :, 0]


def _paint(image: np.ndarray, name: str, color: np.ndarray, center: np.ndarray, radius: float):
  """Blends one shape into the float image `[SIZE, SIZE, 3]`, in place."""
  x0, y0 = np.floor(center - radius).astype(int) - 1
  x1, y1 = np.ceil(center + radius).astype(int) + 1
  window = image[max(y0, 0) : y1, max(x0, 0) : x1]
  x = np.arange(max(x0, 0), min(x1, SIZE)) + 0.5 - center[0]
  y = np.arange(max(y0, 0), min(y1, SIZE)) + 0.5 - center[1]
  alpha = coverage(name, x[None, :], y[:, None], radius)[..., None]
  window += alpha * (color - window)


def draw_contrast(washed_out: float, rng: np.random.Generator) -> float:
  """Contrast of the next image, for `draw`: a share `washed_out` of them has little."""
  return rng.uniform(*WASHED_OUT) if washed_out and rng.random() < washed_out else 1.0


def draw(
  record: dict, rng: np.random.Generator, *, contrast: float = 1.0
) -> tuple[np.ndarray, list[Shape]]:
  """Draws one scene that holds exactly what the record says.

  Sizes (20 to 26 pixels), places, the grey of the background and every colour the record leaves
  open are random; every shape has a quarter of the image to itself. A required relation holds by
  GenEval's rule with a margin, and no other relation holds.

  Args:
    record: a record of `grammar.all_records`.
    rng: the source of all randomness.
    contrast: of the shapes against the background, 1 for the colours of `PALETTE`.

  Returns:
    The image, uint8 `[64, 64, 3]`, and its shapes in the order of the record's `include`.
  """
  wanted, constraints, first_of = [], [], []
  for need in record["include"]:
    first_of.append(len(wanted))
    if "position" in need:
      relation, index = need["position"]
      constraints.append((len(wanted), first_of[index], relation))
    wanted += [(need["class"], need.get("color"))] * need["count"]
  centers, radii = _layout(len(wanted), constraints, rng)
  background = rng.uniform(*BACKGROUND)
  image = np.full((SIZE, SIZE, 3), background)
  shapes = []
  for (name, color), center, radius in zip(wanted, centers, radii, strict=True):
    color = color or COLORS[rng.integers(len(COLORS))]
    rgb = np.asarray(PALETTE[color]) + rng.uniform(-COLOR_JITTER, COLOR_JITTER, 3)
    _paint(image, name, background + contrast * (rgb - background), center, radius)
    box = (*(center - radius), *(center + radius))
    shapes.append(Shape(name, color, tuple(float(value) for value in box)))
  return np.clip(np.rint(image), 0, 255).astype(np.uint8), shapes
