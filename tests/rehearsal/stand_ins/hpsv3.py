"""The interface of the package hpsv3, which rtdmd_jax calls, over a score of the image alone."""

import numpy as np
from PIL import Image


class HPSv3RewardInferencer:
  """Scores the contrast of an image; the published model is a 7 B network."""

  def __init__(self, config_path, checkpoint_path, device):
    del config_path, device
    with open(checkpoint_path, "rb") as file:
      file.read(1)

  def reward(self, image_paths, prompts):
    """Rows of (mean, spread), one for each image."""
    assert len(image_paths) == len(prompts)
    images = [np.asarray(Image.open(path), np.float32) / 255 for path in image_paths]
    return [(float(image.std()), 1.0) for image in images]
