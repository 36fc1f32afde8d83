"""Image preprocessing as constant matrix products: differentiable and on the device.

Resizing along one axis is a linear map that depends on the sizes alone, so a resize and a crop are
one matrix for rows and one for columns.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.errors import UserError


def _triangle(x: np.ndarray) -> np.ndarray:
  return np.maximum(1.0 - np.abs(x), 0.0)


def _cubic(x: np.ndarray) -> np.ndarray:
  # Keys' cubic convolution with a = -0.5, what Pillow and torch take where they antialias.
  a, x = -0.5, np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x**2 + 1
  far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
  return np.where(x < 1, near, np.where(x < 2, far, 0.0))


# Kernel and half its width in pixels of the smaller image.
_KERNELS = {"bilinear": (_triangle, 1.0), "bicubic": (_cubic, 2.0)}


@functools.lru_cache(maxsize=64)
def resize_matrix(source: int, target: int, method: str) -> np.ndarray:
  """Antialiased resampling of one axis, float32 [target, source], rows of sum 1.

  Equals `torch.nn.functional.interpolate(..., antialias=True)` and Pillow's `resize` of float
  images up to rounding. Cubic results may overshoot the range of the input.

  Args:
    source: length before.
    target: length after.
    method: "bilinear" or "bicubic".
  """
  if method not in _KERNELS or source < 1 or target < 1:
    raise ValueError(f"cannot resize {source} to {target} with {method!r}")
  kernel, support = _KERNELS[method]
  scale = source / target
  # Below 1 the image grows and the kernel keeps its width.
  width = max(scale, 1.0)
  centre = (np.arange(target) + 0.5)[:, None] * scale
  first = np.maximum(np.floor(centre - support * width + 0.5), 0)
  last = np.minimum(np.floor(centre + support * width + 0.5), source)
  pixel = np.arange(source)[None]
  inside = (pixel >= first) & (pixel < last)
  weight = np.where(inside, kernel((pixel + 0.5 - centre) / width), 0.0)
  return (weight / weight.sum(1, keepdims=True)).astype(np.float32)


def resize(images: jax.Array, height: int, width: int, method: str) -> jax.Array:
  """Antialiased resize of [B, H, W, C] to float32 [B, height, width, C]; see `resize_matrix`."""
  rows = resize_matrix(images.shape[1], height, method)
  columns = resize_matrix(images.shape[2], width, method)
  return _apply(images, rows, columns)


def _apply(images: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
  # Full float32 products: bfloat16 ones, an accelerator's default, would lose an 8-bit step.
  product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  x = product("oh,bhwc->bowc", rows, images.astype(jnp.float32))
  return product("ow,bhwc->bhoc", columns, x)


@dataclass(frozen=True)
class ClipTransform:
  """Shortest edge to `edge`, centre crop to `crop` x `crop`, normalisation by channel.

  Attributes:
    edge: shortest side after the resize, in pixels; the other side is rounded down.
    crop: side of the result, at most `edge`.
    mean, std: one a channel, for images in [0, 1].
    method: "bilinear" or "bicubic", both antialiased.
  """

  edge: int
  crop: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  method: str = "bilinear"

  @classmethod
  def from_dict(cls, config: Mapping[str, Any], *, method: str) -> "ClipTransform":
    """Reads a `preprocessor_config.json` of transformers' CLIP image processor.

    Args:
      config: contents of the file. Its `resample` is not read: rewards differ in the kernel they
        were published with, so the caller chooses.
      method: see the class.

    Raises:
      UserError: a missing value, or a step switched off.
    """
    for step in ("do_resize", "do_center_crop", "do_normalize"):
      if not config.get(step, True):
        raise UserError(f"preprocessor_config.json has {step} false; only true is supported.")
    edge = _side(config, "size", ("shortest_edge",))
    crop = _side(config, "crop_size", ("height", "width"))
    if crop > edge:
      raise UserError(
        f"preprocessor_config.json crops {crop} pixels from {edge}; crop_size is too large."
      )
    mean, std = (_channels(config, name) for name in ("image_mean", "image_std"))
    return cls(edge, crop, mean, std, method)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images [B, H, W, C] in [0, 1] to float32 [B, crop, crop, C], normalised."""
    if images.ndim != 4 or images.shape[-1] != len(self.mean):
      raise ValueError(f"images are {images.shape}, expected [B, H, W, {len(self.mean)}]")
    height, width = images.shape[1:3]
    short = min(height, width)
    rows, columns = (
      _crop(resize_matrix(side, self.edge * side // short, self.method), self.crop)
      for side in (height, width)
    )
    x = _apply(images, rows, columns)
    return (x - np.float32(self.mean)) / np.float32(self.std)


def _crop(matrix: np.ndarray, length: int) -> np.ndarray:
  # torchvision's rule, half to even; Pillow-based processors round an odd margin down instead.
  start = round((matrix.shape[0] - length) / 2)
  return matrix[start : start + length]


def _side(config: Mapping[str, Any], name: str, keys: Sequence[str]) -> int:
  """A side given as a number (old files) or as an object with `keys`, all equal."""
  value = config.get(name)
  sides = {value.get(key) for key in keys} if isinstance(value, Mapping) else {value}
  side = sides.pop()
  if sides or not isinstance(side, int):
    raise UserError(
      f'"{name}" in preprocessor_config.json is {value!r}, expected one whole number'
      f" ({', '.join(keys)})."
    )
  return side


def _channels(config: Mapping[str, Any], name: str) -> tuple[float, ...]:
  value = config.get(name)
  if not isinstance(value, Sequence) or len(value) != 3:
    raise UserError(f'"{name}" in preprocessor_config.json is {value!r}, expected three numbers.')
  return tuple(float(v) for v in value)
