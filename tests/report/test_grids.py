import numpy as np
import pytest
from PIL import Image, ImageFont

from rtdmd_jax.report.grids import grid, save_png, side_by_side, wrap


def flat(*values, size=160):
  return np.stack([np.full((size, size, 3), value, np.uint8) for value in values])


def test_images_stand_where_they_belong():
  sheet = np.asarray(grid(flat(10, 20, 30), columns=2))
  assert sheet.shape == (2 * 168 + 8, 2 * 168 + 8, 3)
  assert (sheet[8:168, 8:168] == 10).all() and (sheet[8:168, 176:336] == 20).all()
  assert (sheet[176:336, 8:168] == 30).all() and (sheet[176:336, 176:336] == 255).all()


def test_captions_are_drawn_under_their_image():
  plain = np.asarray(grid(flat(10, 20), ["", ""], columns=2))
  texted = np.asarray(grid(flat(10, 20), ["", "a red cube " * 20], columns=2))
  assert plain.shape == texted.shape
  rows, columns = np.nonzero((plain != texted).any(-1))
  assert rows.min() >= 168 and 176 <= columns.min() and columns.max() <= 336


def test_small_images_keep_their_pixels():
  image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
  sheet = np.asarray(grid(image))
  np.testing.assert_array_equal(sheet[8:136:4, 8:136:4], image[0])
  assert np.asarray(grid(flat(7), cell=64)).shape == (80, 80, 3)


def test_side_by_side_rows():
  sheet = np.asarray(
    side_by_side({"teacher": flat(10, 20), "result": flat(30, 40, size=80)}, ["a", "b"])
  )
  margin = sheet.shape[1] - (2 * 168 + 8)
  for row, values in enumerate([(10, 20), (30, 40)]):
    for column, value in enumerate(values):
      y, x = 8 + row * 168, margin + 8 + column * 168
      assert (sheet[y : y + 160, x : x + 160] == value).all()
  for row in range(2):
    assert (sheet[8 + row * 168 : 40 + row * 168, :margin] < 200).any()  # the labels


def test_wrap():
  font = ImageFont.load_default(size=12)
  text = "a photo of a red cube left of a blue sphere"
  rows = wrap(text, font, 100, 9)
  assert " ".join(rows) == text and all(font.getlength(row) <= 100 for row in rows)
  cut = wrap(text, font, 100, 2)
  assert len(cut) == 2 and cut[0] == rows[0] and cut[1].endswith("…")
  assert font.getlength(cut[1]) <= 100
  assert "".join(wrap("x" * 60, font, 100, 99)) == "x" * 60
  assert wrap("", font, 100, 2) == []


def test_save_png(tmp_path):
  save_png(tmp_path / "a/b.png", grid(flat(1)))
  assert Image.open(tmp_path / "a/b.png").size == (176, 176)
  assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.png"]


def test_errors():
  with pytest.raises(ValueError, match="need uint8 images"):
    grid(np.zeros((1, 4, 4, 3), np.float32))
  with pytest.raises(ValueError, match="2 images but 1 captions"):
    grid(flat(1, 2), ["a"])
  with pytest.raises(ValueError, match="result has 1 images for 2 captions"):
    side_by_side({"result": flat(1)}, ["a", "b"])
  with pytest.raises(ValueError, match="at least one system"):
    side_by_side({}, [])
