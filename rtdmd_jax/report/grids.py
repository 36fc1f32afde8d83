"""Grids of captioned images for previews and comparisons."""

import bisect
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rtdmd_jax.report import captions as fonts
from rtdmd_jax.runtime.files import replace_file

_PAPER, _INK, _FAINT = (255, 255, 255), (32, 32, 32), (110, 110, 110)
_GAP = 8
_LINES = 3


def grid(
  images: np.ndarray,
  captions: Sequence[str] | None = None,
  *,
  columns: int | None = None,
  cell: int | None = None,
) -> Image.Image:
  """Lay out images in rows, each with its caption underneath.

  Args:
    images: uint8 `[N, H, W, 3]`.
    captions: N strings; long ones are wrapped to three lines and cut, and in place of those that
      cannot be drawn stands the name that `captions.labels` gives them.
    columns: images a row; about a square by default.
    cell: width of an image in the grid in pixels; its own width, at least 128, by default.

  Returns:
    An RGB image.

  Raises:
    ValueError: wrong shape or dtype, no images, or another number of captions.
  """
  _check(images)
  count = len(images)
  if captions is not None and len(captions) != count:
    raise ValueError(f"{count} images but {len(captions)} captions")
  columns = min(columns or int(np.ceil(np.sqrt(count))), count)
  cells = _resize(images, cell)
  width, height = cells[0].size
  texts = [] if captions is None else fonts.labels(captions)[0]
  faces = [fonts.font(text, _font_size(width)) for text in texts]
  caption_height = _LINES * max(map(_line_height, faces)) + _GAP // 2 if faces else 0
  rows = -(-count // columns)
  sheet = Image.new(
    "RGB",
    (columns * (width + _GAP) + _GAP, rows * (height + caption_height + _GAP) + _GAP),
    _PAPER,
  )
  draw = ImageDraw.Draw(sheet)
  for index, picture in enumerate(cells):
    x = _GAP + index % columns * (width + _GAP)
    y = _GAP + index // columns * (height + caption_height + _GAP)
    sheet.paste(picture, (x, y))
    if texts:
      text = "\n".join(wrap(texts[index], faces[index], width, _LINES))
      draw.multiline_text((x, y + height + _GAP // 4), text, _INK, faces[index], spacing=2)
  return sheet


def side_by_side(
  systems: Mapping[str, np.ndarray],
  captions: Sequence[str],
  *,
  cell: int | None = None,
) -> Image.Image:
  """One labelled row a system, one captioned column a prompt, to compare the same prompts.

  Args:
    systems: label to uint8 images `[N, H, W, 3]`, the same N for all; sizes may differ.
    captions: N prompts.
    cell: width of an image in pixels; that of the widest, at least 128, by default.

  Raises:
    ValueError: no systems, or numbers that differ.
  """
  if not systems:
    raise ValueError("side_by_side needs at least one system")
  for name, images in systems.items():
    _check(images)
    if len(images) != len(captions):
      raise ValueError(f"{name} has {len(images)} images for {len(captions)} captions")
  cell = cell or max(128, *(images.shape[2] for images in systems.values()))
  font = fonts.font("", _font_size(cell))
  margin = int(max(font.getlength(name) for name in systems)) + 2 * _GAP
  labels = list(systems)
  strips = [
    grid(systems[name], captions if name == labels[-1] else None, columns=len(captions), cell=cell)
    for name in labels
  ]
  sheet = Image.new(
    "RGB",
    (margin + strips[0].width, sum(s.height for s in strips) - _GAP * (len(strips) - 1)),
    _PAPER,
  )
  draw = ImageDraw.Draw(sheet)
  y = 0
  for name, strip in zip(labels, strips, strict=True):
    sheet.paste(strip, (margin, y))
    draw.text((_GAP, y + _GAP), name, _FAINT, font)
    y += strip.height - _GAP
  return sheet


def save_png(path: Path, image: Image.Image) -> None:
  """Write `image` as PNG, creating the folder; readers never see half a file."""
  replace_file(path, lambda partial: image.save(partial, format="PNG", optimize=True))


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
  """Break `text` to at most `lines` lines of `width` pixels, with an ellipsis where it is cut."""
  rows: list[str] = []
  row = ""
  for word in text.split():
    if len(rows) > lines:  # the rest is cut off
      break
    while font.getlength(word) > width and len(word) > 1:  # a word longer than a line
      size = lambda n, word=word: font.getlength(word[:n])  # noqa: E731
      head = max(bisect.bisect_right(range(len(word)), width, key=size) - 1, 1)
      rows += [row] * bool(row) + [word[:head]]
      row, word = "", word[head:]
    joined = f"{row} {word}".strip()
    if font.getlength(joined) <= width:
      row = joined
    else:
      rows, row = [*rows, row], word
  rows += [row] * bool(row)
  if len(rows) <= lines:
    return rows
  last = rows[lines - 1]
  while last and font.getlength(f"{last}…") > width:
    last = last[:-1].rstrip()
  return [*rows[: lines - 1], f"{last}…"]


def _check(images: np.ndarray) -> None:
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
    raise ValueError(f"need uint8 images [N, H, W, 3], got {images.dtype} {list(images.shape)}")


def _resize(images: np.ndarray, cell: int | None) -> list[Image.Image]:
  height, width = images.shape[1:3]
  cell = cell or max(width, 128)
  if cell == width:
    return [Image.fromarray(image) for image in images]
  # Small images are enlarged by repeating pixels: smoothing would hide what the model drew.
  method = Image.Resampling.NEAREST if cell > width else Image.Resampling.LANCZOS
  size = (cell, max(1, round(height * cell / width)))
  return [Image.fromarray(image).resize(size, method) for image in images]


def _font_size(width: int) -> int:
  return max(11, width // 20)


def _line_height(font: ImageFont.FreeTypeFont) -> int:
  ascent, descent = font.getmetrics()
  return ascent + descent + 2
