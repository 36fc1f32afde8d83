import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.rewards.device.preprocess import ClipTransform, resize

torch = pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.parity
SIZES = [((64, 48), (32, 24)), ((50, 37), (22, 31)), ((16, 24), (40, 36)), ((33, 33), (33, 14))]


def _images(height, width):
  return np.random.default_rng(0).uniform(size=(2, height, width, 3)).astype(np.float32)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("source", "target"), SIZES)
def test_equals_torch_with_gradient(method, source, target):
  images = _images(*source)
  leaf = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
  want = torch.nn.functional.interpolate(leaf, target, mode=method, antialias=True)
  want.square().sum().backward()
  got = resize(images, *target, method)
  np.testing.assert_allclose(got, want.detach().numpy().transpose(0, 2, 3, 1), atol=2e-6)
  gradient = jax.grad(lambda x: jnp.square(resize(x, *target, method)).sum())(images)
  np.testing.assert_allclose(
    gradient, leaf.grad.numpy().transpose(0, 2, 3, 1), atol=1e-5, rtol=1e-5
  )


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_equals_pillow_on_float_images(source, target):
  image = _images(*source)[0]
  got = resize(image[None], *target, "bicubic")[0]
  for channel in range(3):
    plane = Image.fromarray(image[..., channel])
    want = np.asarray(plane.resize(target[::-1], Image.Resampling.BICUBIC))
    np.testing.assert_allclose(got[..., channel], want, atol=1e-5)


def _pillow_8_bit(image, target):
  """(ours, Pillow's) bicubic of one image, both in [0, 1]."""
  image = np.round(255 * image).astype(np.uint8)
  want = np.asarray(Image.fromarray(image).resize(target[::-1], Image.Resampling.BICUBIC)) / 255
  return np.clip(resize(image[None] / np.float32(255), *target, "bicubic")[0], 0, 1), want


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_differs_from_pillow_by_the_two_roundings_to_8_bits(source, target):
  # At half contrast nothing overshoots: each pass rounds by half a step, amplified by the second.
  got, want = _pillow_8_bit(0.25 + 0.5 * _images(*source)[0], target)
  error = np.abs(got - want)
  assert error.mean() < 2e-3
  assert error.max() < 1.3 / 255


def test_stays_close_to_pillow_at_full_contrast():
  # Pillow also clips overshoot between its passes, which white noise provokes.
  got, want = _pillow_8_bit(_images(64, 48)[0], (32, 24))
  assert np.abs(got - want).max() < 1.2e-2


@pytest.mark.parametrize("shape", [(40, 40), (60, 41), (37, 64)])
def test_transform_equals_torchs_steps(shape):
  images = _images(*shape)
  transform = ClipTransform(24, 20, (0.5, 0.4, 0.3), (0.25, 0.5, 1.0))
  short = min(shape)
  size = tuple(int(24 * side / short) for side in shape)
  x = torch.tensor(images.transpose(0, 3, 1, 2))
  x = torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=True)
  top, left = (int(round((side - 20) / 2.0)) for side in size)
  x = x[:, :, top : top + 20, left : left + 20].numpy().transpose(0, 2, 3, 1)
  want = (x - np.array([0.5, 0.4, 0.3])) / np.array([0.25, 0.5, 1.0])
  np.testing.assert_allclose(transform(images), want, atol=1e-5)
