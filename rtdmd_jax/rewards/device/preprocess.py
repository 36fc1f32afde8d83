"""Image preprocessing as constant matrix products: differentiable and on the device.

Resizing along one axis is a linear map that depends on the sizes alone, so a resize and a crop, or
a black border, are one matrix for rows and one for columns. Every reward has one such transform for
scoring and for back-propagation. What RTDMD's released code does instead, scores of 8-bit images
and other kernels for gradients, is there for comparison with published numbers.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.errors import UserError

# Of the images that CLIP and BLIP were trained on, by channel.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _triangle(x: np.ndarray) -> np.ndarray:
  return np.maximum(1.0 - np.abs(x), 0.0)


def _cubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
  # Keys' cubic convolution; a = -0.5 is what Pillow and torch take where they antialias.
  x = np.abs(x)
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
  return _resize_weights(source, target, method).astype(np.float32)


# Fractional bits of Pillow's weights for 8-bit images, and how many of them are summed apart: sums
# of 8-bit pixels times 11-bit weights are exact in float32.
_BITS, _LOW_BITS = 22, 11


@functools.lru_cache(maxsize=64)
def pillow_matrix(source: int, target: int, method: str) -> np.ndarray:
  """`resize_matrix` as Pillow has it for 8-bit images: fixed point, int32, 22 fractional bits."""
  weights = _resize_weights(source, target, method) * (1 << _BITS)
  return np.trunc(weights + np.copysign(0.5, weights)).astype(np.int32)


def _resize_weights(source: int, target: int, method: str) -> np.ndarray:
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
  return weight / weight.sum(1, keepdims=True)


@functools.lru_cache(maxsize=64)
def plain_cubic_matrix(source: int, target: int) -> np.ndarray:
  """Cubic interpolation of one axis without antialiasing, float32 [target, source].

  Equals `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`: four taps with
  a = -0.75, those outside repeat the edge pixel.

  Args:
    source: length before.
    target: length after.
  """
  if source < 1 or target < 1:
    raise ValueError(f"cannot resize {source} to {target}")
  centre = (np.arange(target) + 0.5) * (source / target) - 0.5
  first = np.floor(centre).astype(int) - 1
  matrix = np.zeros((target, source))
  for tap in range(4):
    index = np.clip(first + tap, 0, source - 1)
    np.add.at(matrix, (np.arange(target), index), _cubic(centre - (first + tap), -0.75))
  return matrix.astype(np.float32)


def resize(images: jax.Array, height: int, width: int, method: str) -> jax.Array:
  """Antialiased resize of [B, H, W, C] to float32 [B, height, width, C]; see `resize_matrix`."""
  rows = resize_matrix(images.shape[1], height, method)
  columns = resize_matrix(images.shape[2], width, method)
  return _apply(images, rows, columns)


def _apply(images: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
  return _along_columns(_along_rows(images.astype(jnp.float32), rows), columns)


# Full float32 products: bfloat16 ones, an accelerator's default, would lose an 8-bit step.
_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _along_rows(x: jax.Array, matrix: np.ndarray) -> jax.Array:
  return _product("oh,bhwc->bowc", matrix, x)


def _along_columns(x: jax.Array, matrix: np.ndarray) -> jax.Array:
  return _product("ow,bhwc->bhoc", matrix, x)


def to_bytes(images: jax.Array) -> jax.Array:
  """Images in [0, 1] as float32 multiples of 1/255, rounded half to even and clipped."""
  return jnp.clip(jnp.round(255.0 * images.astype(jnp.float32)), 0.0, 255.0) / 255.0


def _pillow(images: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
  """Pillow's resize of 8-bit images in [0, 1], bit for bit; the matrices are `pillow_matrix`'s."""
  x = jnp.round(255.0 * images.astype(jnp.float32))
  for along, matrix in ((_along_columns, columns), (_along_rows, rows)):
    high = np.rint(matrix / (1 << _LOW_BITS)).astype(np.int32)
    low = matrix - (high << _LOW_BITS)
    high, low = (along(x, part.astype(np.float32)).astype(jnp.int32) for part in (high, low))
    total = (high << _LOW_BITS) + low + (1 << (_BITS - 1))
    x = jnp.clip(total >> _BITS, 0, 255).astype(jnp.float32)
  return x / 255.0


# How a transform rounds: not at all; the image to 8 bits; as Pillow, also after either pass. Only
# the first has a gradient.
ROUNDINGS = ("none", "bytes", "pillow")


def _transform(
  images: jax.Array, transform: Any, rows: np.ndarray, columns: np.ndarray
) -> jax.Array:
  """Resizes as `transform.rounding` says and normalises with its mean and standard deviation."""
  if transform.rounding not in ROUNDINGS:
    raise ValueError(f"rounding is {transform.rounding!r}, expected one of {', '.join(ROUNDINGS)}")
  pillow = transform.rounding == "pillow"
  if pillow != np.issubdtype(rows.dtype, np.integer):
    raise ValueError(f"{type(transform).__name__} cannot round as Pillow does")
  if transform.rounding != "none":
    images = to_bytes(images)
  run = _pillow if pillow else _apply
  x = run(images, rows, columns)
  return (x - np.float32(transform.mean)) / np.float32(transform.std)


@dataclass(frozen=True)
class ClipTransform:
  """Shortest edge to `edge`, centre crop to `crop` x `crop`, normalisation by channel.

  Attributes:
    edge: shortest side after the resize, in pixels; the other side is rounded down.
    crop: side of the result, at most `edge`.
    mean, std: one a channel, for images in [0, 1].
    method: "bilinear" or "bicubic", both antialiased.
    rounding: one of `ROUNDINGS`.
    margin: how half a pixel of margin is rounded: "even" as torchvision does, or "down" as the
      processors of transformers do.
  """

  edge: int
  crop: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  method: str = "bilinear"
  rounding: str = "none"
  margin: str = "even"

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
    height, width = _sides(images, self.mean)
    short = min(height, width)
    matrix = pillow_matrix if self.rounding == "pillow" else resize_matrix
    rows, columns = (
      self._crop(matrix(side, self.edge * side // short, self.method)) for side in (height, width)
    )
    return _transform(images, self, rows, columns)

  def _crop(self, matrix: np.ndarray) -> np.ndarray:
    if self.margin not in ("even", "down"):
      raise ValueError(f"margin is {self.margin!r}, expected 'even' or 'down'")
    free = matrix.shape[0] - self.crop
    start = free // 2 if self.margin == "down" else round(free / 2)
    return matrix[start : start + self.crop]


@dataclass(frozen=True)
class PadTransform:
  """Longest side to `side`, black borders to a square, normalisation by channel (HPSv2).

  Attributes:
    side: side of the result in pixels.
    mean, std: one a channel, for images in [0, 1].
    method: "bilinear" or "bicubic", both antialiased; bicubic overshoot is not clipped.
    rounding: "none" or "bytes".
  """

  side: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  method: str = "bicubic"
  rounding: str = "none"

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images [B, H, W, C] in [0, 1] to float32 [B, side, side, C], normalised."""
    height, width = _sides(images, self.mean)
    scale = self.side / max(height, width)
    rows, columns = (self._pad(length, round(length * scale)) for length in (height, width))
    return _transform(images, self, rows, columns)

  def _pad(self, source: int, target: int) -> np.ndarray:
    """The matrix of a resize between rows of zeros; an odd border is larger at the end."""
    matrix = np.zeros((self.side, source), np.float32)
    start = (self.side - target) // 2
    matrix[start : start + target] = resize_matrix(source, target, self.method)
    return matrix


@dataclass(frozen=True)
class StretchTransform:
  """Both sides to `side` by cubic interpolation without antialiasing, and normalisation.

  What RTDMD's released code back-propagates ImageReward through, whatever the aspect ratio.
  """

  side: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  rounding: str = "none"

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images [B, H, W, C] in [0, 1] to float32 [B, side, side, C], normalised."""
    rows, columns = (plain_cubic_matrix(n, self.side) for n in _sides(images, self.mean))
    return _transform(images, self, rows, columns)


def _sides(images: jax.Array, mean: Sequence[float]) -> tuple[int, int]:
  if images.ndim != 4 or images.shape[-1] != len(mean):
    raise ValueError(f"images are {images.shape}, expected [B, H, W, {len(mean)}]")
  return images.shape[1], images.shape[2]


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
