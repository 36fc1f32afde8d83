from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from rtdmd_jax.datasets.shapes.draw import PALETTE, coverage, draw
from rtdmd_jax.datasets.shapes.grammar import COLORS, SHAPES, TAGS, all_records
from rtdmd_jax.rewards.host.geneval import COUNTING_THRESHOLD, SCORE_THRESHOLD, GenEval
from rtdmd_jax.rewards.host.shapes_detector import detect_shapes

_SCENES = 2100


@pytest.fixture(scope="module")
def scenes():
  rng = np.random.default_rng(0)
  by_tag = [[r for r in all_records() if r["tag"] == tag] for tag in TAGS]
  records = [by_tag[i % 6][rng.integers(len(by_tag[i % 6]))] for i in range(_SCENES)]
  images, truth = zip(*(draw(record, rng) for record in records), strict=True)
  return records, np.stack(images), truth


def degrade(images, sigma, noise):
  """Gaussian blur and noise (8-bit units), as a small autoencoder leaves them."""
  blurred = ndimage.gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0))
  noisy = blurred + np.random.default_rng(1).normal(0, noise, images.shape)
  return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def accuracy(found, truth, threshold):
  """Share of objects with class and colour right, and of images with exactly the right set."""
  right = total = exact = 0
  for detections, shapes in zip(found, truth, strict=True):
    seen = Counter((d.name, d.color) for d in detections if d.score > threshold)
    true = Counter((s.name, s.color) for s in shapes)
    right += (seen & true).total()
    total += true.total()
    exact += seen == true
  return right / total, exact / len(truth)


@pytest.mark.parametrize(("sigma", "noise"), [(0.0, 0.0), (0.7, 3.0)])
def test_accuracy_on_ground_truth(scenes, sigma, noise):
  _, images, truth = scenes
  found = detect_shapes(degrade(images, sigma, noise) if sigma else images)
  for threshold in (SCORE_THRESHOLD, COUNTING_THRESHOLD):
    objects, exact = accuracy(found, truth, threshold)
    print(f"blur {sigma} noise {noise} score > {threshold}: objects {objects}, images {exact}")
    assert objects >= 0.99 and exact >= 0.99, (threshold, objects, exact)


def test_boxes_are_sub_pixel(scenes):
  _, images, truth = scenes
  errors = []
  for detections, shapes in zip(detect_shapes(images[:300]), truth[:300], strict=True):
    for shape in shapes:
      candidates = [d.box for d in detections if (d.name, d.color) == (shape.name, shape.color)]
      errors.append(min(np.abs(np.subtract(box, shape.box)).max() for box in candidates))
  assert np.mean(errors) < 0.25 and np.max(errors) < 1.0


def test_true_scenes_earn_the_full_reward_and_shuffled_ones_do_not(scenes):
  records, images, _ = scenes
  records, images = records[:600], images[:600]
  scorer = GenEval(detect_shapes)
  prompts = [r["prompt"] for r in records]
  right = scorer(images, prompts, records)
  wrong = scorer(np.roll(images, 1, axis=0), prompts, records)
  assert right["geneval"].mean() > 0.995 and right["strict_accuracy"].mean() > 0.99
  assert wrong["geneval"].mean() < 0.5 and wrong["strict_accuracy"].mean() < 0.1


def _grid():
  return np.arange(64)[None, :] + 0.5 - 32, np.arange(64)[:, None] + 0.5 - 32


def _paint(alpha, color):
  image = 228 + alpha[..., None] * (np.asarray(PALETTE[color], float) - 228)
  return np.clip(np.rint(image), 0, 255).astype(np.uint8)


# The upper half of a triangle is a triangle.
@pytest.mark.parametrize("name", ["circle", "square", "cross"])
@pytest.mark.parametrize("angle", np.linspace(0, 2 * np.pi, 8, endpoint=False))
def test_halves_are_rejected(name, angle):
  x, y = _grid()
  half = coverage(name, x, y, 11.0) * (np.cos(angle) * x + np.sin(angle) * y > 0)
  found = detect_shapes(_paint(half, "blue")[None])[0]
  assert all(d.score < SCORE_THRESHOLD for d in found)


def test_elongated_and_merged_patches_are_rejected():
  x, y = _grid()
  bar = np.clip(np.minimum(8.5 - np.abs(y), 14.5 - np.abs(x)), 0, 1)
  pair = np.maximum(coverage("circle", x - 7, y, 9.0), coverage("circle", x + 7, y, 9.0))
  for alpha in (bar, pair):
    assert all(d.score < SCORE_THRESHOLD for d in detect_shapes(_paint(alpha, "red")[None])[0])


def test_nothing_on_noise_blank_and_coloured_frames():
  noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3)).astype(np.uint8)
  blank = np.full((1, 64, 64, 3), 228, np.uint8)
  red = np.broadcast_to(np.uint8(PALETTE["red"]), blank.shape)
  dark = np.full_like(blank, 60)
  for images in (noise, blank, red, dark):
    for found in detect_shapes(images):
      assert all(d.score < SCORE_THRESHOLD for d in found)


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("name", SHAPES)
def test_confidence_falls_as_the_colour_fades(name, color):
  x, y = _grid()
  alpha = coverage(name, x, y, 11.0)
  full, pale, faint = (detect_shapes(_paint(alpha * f, color)[None])[0] for f in (1, 0.8, 0.3))
  assert (full[0].name, full[0].color, full[0].score) == (name, color, 1.0)
  assert (pale[0].name, pale[0].color) == (name, color)
  assert max((d.score for d in faint), default=0.0) < full[0].score


def test_results_do_not_depend_on_the_batch(scenes):
  images = scenes[1][:70]
  together = detect_shapes(images)
  assert together[65] == detect_shapes(images[65:66])[0]


def test_wrong_dtype_is_refused():
  with pytest.raises(ValueError, match="uint8"):
    detect_shapes(np.zeros((1, 64, 64, 3), np.float32))
