import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.device.preprocess import (
  ClipTransform,
  PadTransform,
  resize,
  resize_matrix,
)

CONFIG = dict(
  size={"shortest_edge": 20},
  crop_size={"height": 16, "width": 16},
  image_mean=[0.5, 0.4, 0.3],
  image_std=[0.25, 0.5, 1.0],
)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("target", [7, 32, 33, 224])
def test_constant_images_stay_constant(method, target):
  np.testing.assert_allclose(resize_matrix(32, target, method).sum(1), 1.0, atol=1e-6)


def test_same_size_is_the_identity():
  for method in ("bilinear", "bicubic"):
    np.testing.assert_array_equal(resize_matrix(9, 9, method), np.eye(9, dtype=np.float32))


def test_halving_by_hand():
  # Triangle of width 4 around the boundary between pixels 2 and 3: 1/8, 3/8, 3/8, 1/8.
  expected = np.array([0, 1, 3, 3, 1, 0]) / 8
  np.testing.assert_allclose(resize_matrix(6, 3, "bilinear")[1], expected, atol=1e-7)


@pytest.mark.parametrize("method", ["linear", "cubic"])
def test_equals_jax_image(method):
  images = jax.random.uniform(jax.random.key(0), (2, 40, 28, 3))
  want = jax.image.resize(images, (2, 16, 50, 3), method, antialias=True)
  np.testing.assert_allclose(resize(images, 16, 50, f"bi{method}"), want, atol=2e-6)


def test_transform_crops_the_centre_of_the_resized_image_and_normalises():
  images = jax.random.uniform(jax.random.key(0), (2, 30, 48, 3))
  transform = ClipTransform.from_dict(CONFIG, method="bicubic")
  whole = resize(images, 20, 32, "bicubic")
  want = (whole[:, 2:18, 8:24] - jnp.array([0.5, 0.4, 0.3])) / jnp.array([0.25, 0.5, 1.0])
  np.testing.assert_allclose(transform(images), want, atol=1e-5)


def test_transform_is_linear_in_the_image_and_so_is_its_gradient():
  transform = ClipTransform.from_dict(CONFIG, method="bilinear")
  ones = jnp.ones((1, 30, 30, 3))
  gradient = jax.grad(lambda x: transform(x)[..., 0].sum())(ones)
  # Each output pixel has weights of sum 1, over the standard deviation 0.25.
  np.testing.assert_allclose(gradient.sum(), 16 * 16 / 0.25, rtol=1e-5)
  assert float(jnp.abs(gradient[..., 1:]).max()) == 0.0


def test_old_files_give_plain_numbers():
  old = CONFIG | dict(size=20, crop_size=16)
  new = ClipTransform.from_dict(CONFIG, method="bilinear")
  assert ClipTransform.from_dict(old, method="bilinear") == new


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(size={"height": 20, "width": 20}), '"size"'),
    (dict(crop_size={"height": 16, "width": 8}), '"crop_size"'),
    (dict(crop_size=24), "crop_size is too large"),
    (dict(image_std=None), '"image_std"'),
    (dict(do_center_crop=False), "do_center_crop"),
  ],
)
def test_bad_files_are_refused(change, message):
  with pytest.raises(UserError, match=message):
    ClipTransform.from_dict(CONFIG | change, method="bilinear")


def test_programmer_mistakes():
  with pytest.raises(ValueError, match="nearest"):
    resize_matrix(4, 2, "nearest")
  with pytest.raises(ValueError, match="expected"):
    ClipTransform.from_dict(CONFIG, method="bilinear")(jnp.zeros((30, 30, 3)))


def test_borders_are_black_and_larger_at_the_end():
  transform = PadTransform(8, (0.5, 0.4, 0.3), (0.25, 0.5, 1.0))
  out = np.asarray(transform(jnp.ones((1, 10, 16, 3))))[0]
  black = -np.array([0.5, 0.4, 0.3]) / np.array([0.25, 0.5, 1.0])
  np.testing.assert_allclose(out[:1], np.broadcast_to(black, (1, 8, 3)), atol=1e-6)
  np.testing.assert_allclose(out[6:], np.broadcast_to(black, (2, 8, 3)), atol=1e-6)
  assert (out[1:6] > 0.5).all()


@pytest.mark.parametrize("rounding", ["bytes", "pillow"])
def test_rounding_ignores_less_than_half_a_step_and_has_no_gradient(rounding):
  transform = ClipTransform.from_dict(CONFIG, method="bicubic")
  rounded = dataclasses.replace(transform, rounding=rounding)
  images = np.random.default_rng(0).integers(1, 255, (1, 30, 40, 3)) / np.float32(255)
  moved = images + 0.4 / 255
  np.testing.assert_array_equal(rounded(images), rounded(moved))
  assert np.abs(transform(images) - transform(moved)).max() > 1e-3
  assert float(jnp.abs(jax.grad(lambda x: rounded(x).sum())(images)).max()) == 0.0
  np.testing.assert_allclose(rounded(images), transform(images), atol=0.1)


def test_margin_rules_differ_at_half_a_pixel():
  even = ClipTransform(20, 17, (0.0,), (1.0,), "bicubic")
  down = dataclasses.replace(even, margin="down")
  image = jnp.arange(20.0)[None, :, None, None] * jnp.ones((1, 20, 20, 1))
  assert (float(even(image)[0, 0, 0, 0]), float(down(image)[0, 0, 0, 0])) == (2.0, 1.0)
  for change in (dict(margin="up"), dict(rounding="half")):
    with pytest.raises(ValueError, match=next(iter(change.values()))):
      dataclasses.replace(even, **change)(image)
  with pytest.raises(ValueError, match="PadTransform cannot round as Pillow"):
    PadTransform(8, (0.0,), (1.0,), rounding="pillow")(image)
