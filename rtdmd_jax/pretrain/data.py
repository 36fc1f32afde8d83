"""Drawn images for training from scratch."""

from typing import NamedTuple

import numpy as np

from rtdmd_jax.datasets.shapes.draw import SIZE, draw, draw_contrast
from rtdmd_jax.datasets.shapes.grammar import TAGS, all_records, split


class Scenes(NamedTuple):
  """Captioned images: `images` [N, 64, 64, 3] uint8, `caption` [N] an index into `captions`."""

  images: np.ndarray
  caption: np.ndarray
  captions: list[str]


def draw_scenes(count: int, seed: int, washed_out: float = 0.0) -> Scenes:
  """Draws `count` scenes of the training records, the six tags equally often.

  Args:
    count: number of images.
    seed: of all randomness.
    washed_out: share of images that are drawn with low contrast.
  """
  records, _ = split(all_records())
  by_tag = [[i for i, record in enumerate(records) if record["tag"] == tag] for tag in TAGS]
  rng = np.random.default_rng(seed)
  images = np.empty((count, SIZE, SIZE, 3), np.uint8)
  caption = np.empty(count, np.int32)
  for n in range(count):
    caption[n] = rng.choice(by_tag[n % len(by_tag)])
    contrast = draw_contrast(washed_out, rng)
    images[n], _ = draw(records[caption[n]], rng, contrast=contrast)
  return Scenes(images, caption, [record["prompt"] for record in records])
