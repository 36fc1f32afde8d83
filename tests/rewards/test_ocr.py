import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from rtdmd_jax import rewards
from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.host.ocr import OCR, edit_distance, rapidocr_reader, target_text, text_score


@pytest.mark.parametrize(
  ("first", "second", "distance"),
  [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2)],
)
def test_edit_distance(first, second, distance):
  assert edit_distance(first, second) == edit_distance(second, first) == distance


@pytest.mark.parametrize(
  ("prompt", "target"),
  [
    ('a sign that says "Spring Sale 20"', "springsale20"),
    ('"One" and "Two"', "one"),
    ("a sign", None),
    ('a sign that says ""', None),
    ('a sign that says " "', None),
  ],
)
def test_target_is_the_first_quoted_text(prompt, target):
  assert target_text(prompt) == target


@pytest.mark.parametrize(
  ("pieces", "score"),
  [
    (["Hello"], 1.0),
    (["HEL", "LO"], 1.0),
    (["say h e l l o now"], 1.0),  # contained
    (["hallo"], 0.8),
    (["hell"], 0.8),
    (["hexxo there"], 0.0),  # far longer than the target
    ([], 0.0),
    (["xyzzy"], 0.0),
  ],
)
def test_score_of_found_text(pieces, score):
  assert text_score(pieces, "hello") == pytest.approx(score)


def test_failures_are_nan_and_blank_images_are_zero():
  def read(image):
    if image[0, 0, 0] == 9:
      raise RuntimeError("engine")
    return ["Hello"] if image[0, 0, 0] else []

  images = np.stack([np.full((2, 2, 3), v, np.uint8) for v in (1, 0, 9, 1, 1)])
  prompts = ['"hello"'] * 3 + ["nothing quoted", '"hallo"']
  scores = OCR(workers=2, reader=lambda: read)(images, prompts, None)
  np.testing.assert_allclose(scores, [1.0, 0.0, np.nan, np.nan, 0.8], rtol=1e-6)


def test_workers_must_be_positive():
  with pytest.raises(UserError, match="workers is 0"):
    rewards.make({"ocr": 1.0}, options={"ocr": {"workers": 0}})


def drawn(text, size, xy=(30, 200), noise=0.0):
  """An image [512, 512, 3] with dark text on a light ground."""
  image = Image.new("RGB", (512, 512), (235, 232, 220))
  ImageDraw.Draw(image).text(xy, text, (20, 30, 60), font=ImageFont.load_default(size))
  pixels = np.asarray(image) + np.random.default_rng(0).normal(0.0, noise, (512, 512, 3))
  return np.clip(pixels, 0, 255).astype(np.uint8)


DRAWN = [
  drawn("HELLO", 64),
  drawn("Spring Collection 2024", 36),
  drawn("Hello World", 48, noise=25.0),
  drawn("Step Goal Achieved", 22),
  drawn("Grand\nOpening", 60),
]
TEXTS = ["HELLO", "Spring Collection 2024", "Hello World", "Step Goal Achieved", "Grand Opening"]


@pytest.fixture(scope="module")
def read():
  pytest.importorskip("rapidocr")
  return rapidocr_reader()


@pytest.mark.parametrize(("image", "text"), list(zip(DRAWN, TEXTS, strict=True)), ids=TEXTS)
def test_drawn_words_are_read_exactly(read, image, text):
  assert "".join(read(image)).replace(" ", "") == text.replace(" ", "")


def test_the_reward_reads_words(read):
  blank = np.full((512, 512, 3), 200, np.uint8)
  images = np.stack([DRAWN[0], DRAWN[0], DRAWN[4], blank])
  prompts = ['the word "Hello"', 'the word "Jello"', 'a banner "grand opening"', 'a "word"']
  scorer = rewards.make({"ocr": 0.5}, options={"ocr": {"workers": 2}})
  scores = scorer(images, prompts)
  np.testing.assert_allclose(scores["ocr"], [1.0, 0.8, 1.0, 0.0], rtol=1e-6)
  np.testing.assert_allclose(scores["mean"], scores["ocr"] / 2)
