"""Captions in any script: a font that can draw them, or a name for what none of them can."""

import functools
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import ImageFont, features

# Beside Pillow's own font, which has little more than ASCII, those of the machine by their usual
# names; none of them has to be there.
_FILES = (
  "DejaVuSans.ttf",
  "NotoSans-Regular.ttf",
  "NotoSansCJK-Regular.ttc",
  "Arial Unicode.ttf",
  "arial.ttf",
)
_MISSING = "\U0010ffff"  # which no font has
_JOINERS = "\u200c\u200d"


def labels(
  captions: Sequence[str], numbers: Sequence[int] | None = None
) -> tuple[list[str], dict[str, str]]:
  """Captions that can be drawn, and what those stand for that name others.

  A caption with a character that no font here has, or whose script needs shaping that this Pillow
  lacks, becomes "prompt 3".

  Args:
    captions: any text.
    numbers: of the captions; by default equal ones count once, from 0.

  Returns:
    As many captions, and the whole text of each name among them.
  """
  if numbers is None:
    order = {text: number for number, text in enumerate(dict.fromkeys(captions))}
    numbers = [order[text] for text in captions]
  shown, names = [], {}
  for number, text in zip(numbers, captions, strict=True):
    visible = _visible(text)
    if _face(visible) is None:
      visible = f"prompt {number}"
      names[visible] = text.encode("utf-8", "backslashreplace").decode()
    shown.append(visible)
  return shown, names


def font(text: str, size: int) -> ImageFont.FreeTypeFont:
  """A font for a caption of `labels`, `size` pixels high."""
  return _open(_face(text) or "", size)


def write_names(path: Path, names: Mapping[str, str]) -> None:
  """Writes what the names of `labels` stand for, a line each; no names, no file."""
  if names:
    lines = (f"{name}: {' '.join(text.split())}\n" for name, text in names.items())
    path.write_text("".join(lines), encoding="utf-8")
  else:
    path.unlink(missing_ok=True)


def _visible(text: str) -> str:
  """The text without characters that leave no mark, which fonts would draw as boxes."""

  def seen(letter: str) -> bool:
    if letter.isspace() or letter in _JOINERS:
      return True
    selector = "\ufe00" <= letter <= "\ufe0f"
    return not selector and unicodedata.category(letter) not in ("Cc", "Cf")

  return "".join(filter(seen, unicodedata.normalize("NFC", text)))


def _face(text: str) -> str | None:
  """The first font's file that draws all of a text, "" for Pillow's own; None if there is none."""
  letters = {letter for letter in text if not letter.isspace()}
  if not features.check("raqm") and any(map(_needs_shaping, letters)):
    return None
  return next((face for face in _faces() if all(_draws(face, c) for c in letters)), None)


def _needs_shaping(letter: str) -> bool:
  right_to_left = unicodedata.bidirectional(letter) in ("R", "AL")
  return right_to_left or unicodedata.category(letter) in ("Mn", "Mc")


@functools.cache
def _faces() -> tuple[str, ...]:
  faces = [""]
  for file in _FILES:
    try:
      ImageFont.truetype(file)
    except OSError:
      continue
    faces.append(file)
  return tuple(faces)


@functools.lru_cache(maxsize=32)
def _open(face: str, size: int) -> ImageFont.FreeTypeFont:
  return ImageFont.truetype(face, size) if face else ImageFont.load_default(size)


@functools.lru_cache(maxsize=2**14)
def _draws(face: str, letter: str) -> bool:
  """Whether a font has a picture of its own for a letter."""
  opened = _open(face, 24)
  missing, own = (opened.getmask(c) for c in (_MISSING, letter))
  return own.size != missing.size or bytes(own) != bytes(missing)
