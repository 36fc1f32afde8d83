"""Signs of reward hacking: statistics of images, and diversity within prompts (monitors.py).

None of these is a reward; they are watched because a policy can raise its rewards by making every
image dark, oversaturated, flat in colour, or the same.
"""

from collections.abc import Sequence

import numpy as np

# A pixel is dark below this luma, in 0..1.
DARK_LUMA = 0.1
# Levels a channel is cut into for the entropy of colours.
COLOUR_LEVELS = 8
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def image_statistics(images: np.ndarray) -> dict[str, np.ndarray]:
  """Statistics of uint8 images [B, H, W, 3], each [B] float64.

  Returns:
    "dark_share": share of pixels with luma below `DARK_LUMA`; "saturation": mean HSV saturation in
    0..1; "colour_entropy": entropy in bits of the histogram over `COLOUR_LEVELS`**3 colours.

  Raises:
    ValueError: the images are not uint8 [B, H, W, 3] with pixels.
  """
  pixels = _pixels(images)
  unit = pixels / 255.0
  high, low = unit.max(-1), unit.min(-1)
  saturation = np.where(high > 0, (high - low) / np.where(high > 0, high, 1.0), 0.0)
  return {
    "dark_share": (unit @ _LUMA < DARK_LUMA).mean(-1),
    "saturation": saturation.mean(-1),
    "colour_entropy": np.array([_entropy(row) for row in pixels]),
  }


def diversity(images: np.ndarray, prompt_ids: Sequence[int]) -> dict[int, float]:
  """Mean over pairs of one prompt's images of their root mean square difference, in 0..1.

  Args:
    images: uint8 [B, H, W, 3].
    prompt_ids: the prompt of each image; one with a single image is left out.
  """
  unit = _pixels(images).reshape(len(images), -1) / 255.0
  ids = np.asarray(prompt_ids)
  if ids.shape != (len(images),):
    raise ValueError(f"{len(images)} images, prompt_ids of shape {ids.shape}")
  distances = {}
  for prompt in dict.fromkeys(ids.tolist()):
    own = unit[ids == prompt]
    pairs = [np.sqrt(np.mean((own[i] - own[j]) ** 2)) for i in range(len(own)) for j in range(i)]
    if pairs:
      distances[prompt] = float(np.mean(pairs))
  return distances


def _pixels(images: np.ndarray) -> np.ndarray:
  """Pixels [B, H * W, 3] of uint8 images."""
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
    raise ValueError(f"images must be uint8 [B, H, W, 3], got {images.dtype} {images.shape}")
  return images.reshape(len(images), -1, 3)


def _entropy(pixels: np.ndarray) -> float:
  level = pixels.astype(np.int64) * COLOUR_LEVELS // 256
  code = level @ np.array([COLOUR_LEVELS**2, COLOUR_LEVELS, 1])
  share = np.unique(code, return_counts=True)[1] / len(code)
  return float(np.sum(share * np.log2(1.0 / share)))
