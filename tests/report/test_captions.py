"""Captions of pictures in scripts that the fonts at hand have, or have not."""

import numpy as np
import pytest

from rtdmd_jax.report import captions
from rtdmd_jax.report.grids import grid, side_by_side

SCRIPTS = {
  "chinese": "一只红色的猫坐在桌子上",
  "arabic": "قطة حمراء على الطاولة",
  "devanagari": "मेज पर लाल बिल्ली",
  "emoji": "a cat \U0001f408\u200d\u2b1b on a table \U0001f600",
  "marks": "q\u0323\u0307 Z\u0351\u036b\u0343",
  "half": "half a pair \ud83d",
}


@pytest.fixture
def own_font_only(monkeypatch):
  monkeypatch.setattr(captions, "_faces", lambda: ("",))


@pytest.mark.usefixtures("own_font_only")
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_no_font_can_draw_is_named_and_written_beside(script, tmp_path):
  texts = ["a red cat", SCRIPTS[script], "a red cat", SCRIPTS[script]]
  shown, names = captions.labels(texts)
  assert shown == ["a red cat", "prompt 1"] * 2
  captions.write_names(tmp_path / "a.txt", names)
  written = (tmp_path / "a.txt").read_text("utf-8")
  assert written == f"prompt 1: {SCRIPTS[script].replace(chr(0xD83D), chr(92) + 'ud83d')}\n"
  captions.write_names(tmp_path / "a.txt", {})
  assert not list(tmp_path.iterdir())
  assert captions.labels(texts, [4, 5, 6, 7])[0][1::2] == ["prompt 5", "prompt 7"]
  images = np.zeros((2, 128, 128, 3), np.uint8)
  named = np.asarray(grid(images, ["a red cat", SCRIPTS[script]]))
  np.testing.assert_array_equal(named, np.asarray(grid(images, ["a red cat", "prompt 1"])))


@pytest.mark.parametrize("text", [*SCRIPTS.values(), "word " * 100, "x" * 500, "猫" * 500])
def test_no_caption_is_an_error(text):
  for caption in (text, f"{text}\n\r\t\0 {text}"):
    sheet = np.asarray(side_by_side({"system": np.zeros((1, 128, 128, 3), np.uint8)}, [caption]))
    assert (sheet[144:] < 128).any()  # there is a caption
    assert (sheet[:, -6:] == 255).all() and (sheet[-4:] == 255).all()  # that stays inside


@pytest.mark.usefixtures("own_font_only")
def test_characters_without_a_mark_do_not_count():
  text = "a red\u200b cat\ufe0f\nand\ta\0 dog\u00ad"
  assert captions.labels([text]) == (["a red cat\nand\ta dog"], {})
  assert captions.labels(["", " \n"]) == (["", " \n"], {})


def test_another_font_of_the_machine_helps_out(monkeypatch):
  monkeypatch.setattr(captions, "_faces", lambda: ("", "other.ttf"))
  monkeypatch.setattr(captions, "_draws", lambda face, letter: letter.isascii() or face != "")
  assert captions._face("cat") == "" and captions._face("кот") == "other.ttf"
  assert captions.labels(["кот", "cat"]) == (["кот", "cat"], {})


def test_without_shaping_such_scripts_are_named(monkeypatch):
  monkeypatch.setattr(captions, "_draws", lambda face, letter: True)
  assert captions.labels([SCRIPTS["chinese"]])[1] == {}
  monkeypatch.setattr(captions.features, "check", lambda name: False)
  names = captions.labels([SCRIPTS[s] for s in ("chinese", "arabic", "devanagari")])[1]
  assert list(names) == ["prompt 1", "prompt 2"]
