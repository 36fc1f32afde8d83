"""The images of the report, embedded so that it is one file."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from rtdmd_jax.errors import UserError

_MAX_PROMPTS = 24
_MAX_PREVIEWS = 8
_CELL, _SHEET = 384, 1600


def compare(
  folder: Path, systems: Sequence[str], colours: Sequence[str], prompts: Sequence[str]
) -> str:
  """The same prompts by every system, side by side.

  Args:
    folder: holds `<system>/<index>.png` for single images, or `<system>.png` for a whole grid.
    systems: names of the systems, in their order.
    colours: a CSS colour for each.
    prompts: the prompt of each index.

  Returns:
    HTML, empty where there are no images.
  """
  files = [_by_index(folder / system) for system in systems]
  shared = sorted(set.intersection(*map(set, files))) if files else []
  cards = []
  for index in shared[:_MAX_PROMPTS]:
    cells = "".join(
      f'<div><div class="system"><span class="dot" style="background:{colour}"></span>'
      f"{escape(system)}</div>{embed(found[index], _CELL, f'{system}, image {index}')}</div>"
      for system, colour, found in zip(systems, colours, files, strict=True)
    )
    text = prompts[index] if index < len(prompts) else f"image {index}"
    columns = f"grid-template-columns:repeat({len(systems)},1fr)"
    row = f'<div class="row" style="{columns}">{cells}</div>'
    cards.append(f'<div class="card">{row}<p>{escape(text)}</p></div>')
  if cards:
    shown = f"The first {len(cards)} of {len(shared)}. " if len(shared) > len(cards) else ""
    return (
      f'<p class="note">{shown}Each card: one prompt and one starting noise for all systems.</p>'
      f'<div class="cards">{"".join(cards)}</div>'
    )
  sheets = [(system, folder / f"{system}.png") for system in systems]
  return "".join(
    f"<h3>{escape(system)}</h3>"
    f'<figure class="sheet">{embed(path, _SHEET, f"images of {system}")}</figure>'
    for system, path in sheets
    if path.is_file()
  )


def previews(folder: Path) -> str:
  """Preview grids `step_<number>.png` over training, at most eight, evenly chosen; HTML."""
  pictures = sorted(
    (int(path.stem.removeprefix("step_")), path)
    for path in folder.glob("step_*.png")
    if path.stem.removeprefix("step_").isdecimal()
  )
  count = min(len(pictures), _MAX_PREVIEWS)
  chosen = [pictures[round(i * (len(pictures) - 1) / max(count - 1, 1))] for i in range(count)]
  figures = "".join(
    f"<figure><figcaption>step {step:,}</figcaption>"
    f"{embed(path, _SHEET // 2, f'preview at step {step}')}</figure>"
    for step, path in chosen
  )
  names = chosen[-1][1].with_suffix(".txt") if chosen else None
  if names is not None and names.is_file():  # of captions that could not be drawn
    lines = escape(names.read_text("utf-8", "replace").strip()).splitlines()
    figures += f'<p class="note">{"<br>".join(lines)}</p>'
  return f'<div class="previews">{figures}</div>' if figures else ""


def embed(path: Path, max_width: int, alternative: str) -> str:
  """An `<img>` with the file's pixels inside.

  Images of up to 256 pixels stay exact (PNG) and are enlarged without smoothing; larger ones are
  reduced to `max_width` and stored as WebP.

  Raises:
    UserError: the file is not an image.
  """
  try:
    image = Image.open(path).convert("RGB")
  except (UnidentifiedImageError, OSError) as error:
    raise UserError(f"{path} is not a readable image; delete it or write it again") from error
  exact = image.width <= 256
  if image.width > max_width:
    height = max(1, round(image.height * max_width / image.width))
    image = image.resize((max_width, height), Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  image.save(buffer, **({"format": "PNG"} if exact else {"format": "WEBP", "quality": 88}))
  kind = "png" if exact else "webp"
  data = base64.b64encode(buffer.getvalue()).decode()
  pixels = ' class="pixels"' if exact else ""
  return (
    f'<img{pixels} width="{image.width}" height="{image.height}" loading="lazy" '
    f'alt="{escape(alternative)}" src="data:image/{kind};base64,{data}">'
  )


def _by_index(folder: Path) -> dict[int, Path]:
  return {int(path.stem): path for path in folder.glob("*.png") if path.stem.isdecimal()}
