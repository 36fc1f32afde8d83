import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.models import convolution
from rtdmd_jax.models.convolution import convolve, convolve_blocks, same_convolution

KEYS = jax.random.split(jax.random.key(0), 3)
LAYOUT = ("NHWC", "HWIO", "NHWC")


def plain(x, kernel, stride=1, padding="SAME"):
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=LAYOUT
  )


def assert_equal_with_gradients(ours, expected, x, kernel):
  out, pullback = jax.vjp(ours, x, kernel)
  expected_out, expected_pullback = jax.vjp(expected, x, kernel)
  cotangent = jax.random.normal(KEYS[2], expected_out.shape)
  np.testing.assert_allclose(out, expected_out, atol=1e-5)
  # Gradients by the kernel are sums over all positions.
  scale = np.sqrt(cotangent.size)
  for one, other in zip(pullback(cotangent), expected_pullback(cotangent), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-6 * scale)


@pytest.mark.parametrize("size", [1, 3])
def test_gradients_are_those_of_the_convolution(size):
  x = jax.random.normal(KEYS[0], (2, 5, 6, 3))
  kernel = jax.random.normal(KEYS[1], (size, size, 3, 4))
  assert_equal_with_gradients(same_convolution, plain, x, kernel)


@pytest.mark.parametrize("rows", [1, 2, 6])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_blocks_of_rows_are_the_convolution(size, rows):
  x = jax.random.normal(KEYS[0], (2, 6, 5, 3))
  kernel = jax.random.normal(KEYS[1], (size, size, 3, 4))
  np.testing.assert_allclose(convolve_blocks(x, kernel, rows), plain(x, kernel), atol=1e-5)


def test_a_tpu_convolves_few_pixels_of_many_channels_in_blocks(monkeypatch):
  # Each call traces a function of its own: what jax has traced it would not trace again.
  def loops(height, channels=512, size=3):
    x, kernel = jnp.zeros((1, height, 8, channels)), jnp.zeros((size, size, channels, channels))
    return str(jax.make_jaxpr(lambda *a: same_convolution(*a))(x, kernel)).count("scan[")

  assert loops(64) == 0
  monkeypatch.setattr(convolution, "platform", lambda: "tpu")
  assert (loops(64), loops(32)) == (1, 1)
  assert {loops(128), loops(16), loops(40), loops(64, channels=256), loops(64, size=1)} == {0}
  monkeypatch.setattr(convolution, "_MANY_CHANNELS", 3)
  x = jax.random.normal(KEYS[0], (1, 32, 8, 3))
  kernel = jax.random.normal(KEYS[1], (3, 3, 3, 4))
  assert_equal_with_gradients(lambda *a: same_convolution(*a), plain, x, kernel)


def test_patches_are_the_strided_convolution():
  x = jax.random.normal(KEYS[0], (2, 8, 12, 3))
  kernel = jax.random.normal(KEYS[1], (4, 4, 3, 5))

  def ours(x, kernel):
    return convolve(x, kernel, (4, 4), [(0, 0), (0, 0)], dimension_numbers=LAYOUT)

  assert "conv" not in str(jax.make_jaxpr(ours)(x, kernel))
  assert_equal_with_gradients(ours, lambda *a: plain(*a, stride=4, padding="VALID"), x, kernel)


def test_other_strides_and_paddings_are_left_to_jax():
  x, kernel = jnp.ones((1, 6, 6, 2)), jnp.ones((3, 3, 2, 2))
  for strides, padding in (
    ((2, 2), [(0, 1), (0, 1)]), ((1, 1), [(0, 0), (0, 0)]), ((4, 4), [(0, 0), (0, 0)])
  ):  # fmt: skip
    ours = convolve(x, kernel, strides, padding, dimension_numbers=LAYOUT)
    expected = jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT)
    np.testing.assert_array_equal(ours, expected)
