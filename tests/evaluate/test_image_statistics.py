import numpy as np
import pytest

from rtdmd_jax.evaluate.image_statistics import diversity, image_statistics


def _flat(*colour):
  return np.broadcast_to(np.array(colour, np.uint8), (4, 4, 3)).copy()


def test_statistics_of_hand_made_images():
  halves = _flat(0, 0, 0)
  halves[:2] = 255
  found = image_statistics(np.stack([_flat(0, 0, 0), _flat(255, 0, 0), halves]))
  np.testing.assert_allclose(found["dark_share"], [1, 0, 0.5])
  np.testing.assert_allclose(found["saturation"], [0, 1, 0])
  np.testing.assert_allclose(found["colour_entropy"], [0, 0, 1])


def test_diversity_is_within_prompts():
  black, white = _flat(0, 0, 0), _flat(255, 255, 255)
  images = np.stack([black, white, black, black, white])
  assert diversity(images, [7, 7, 3, 3, 5]) == {7: 1.0, 3: 0.0}


def test_wrong_images_are_errors():
  with pytest.raises(ValueError, match="uint8"):
    image_statistics(np.zeros((1, 4, 4, 3), np.float32))
  with pytest.raises(ValueError, match="prompt_ids"):
    diversity(np.zeros((2, 4, 4, 3), np.uint8), [0])
