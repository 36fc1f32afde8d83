import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.models.convolution import convolve, same_convolution

KEYS = jax.random.split(jax.random.key(0), 3)
LAYOUT = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize("size", [1, 3])
def test_gradients_are_those_of_the_convolution(size):
  x = jax.random.normal(KEYS[0], (2, 5, 6, 3))
  kernel = jax.random.normal(KEYS[1], (size, size, 3, 4))
  cotangent = jax.random.normal(KEYS[2], (2, 5, 6, 4))
  ours, pullback = jax.vjp(same_convolution, x, kernel)

  def reference(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)

  expected, pullback_expected = jax.vjp(reference, x, kernel)
  np.testing.assert_allclose(ours, expected, atol=1e-5)
  for one, other in zip(pullback(cotangent), pullback_expected(cotangent), strict=True):
    np.testing.assert_allclose(one, other, atol=2e-5)


def test_other_strides_and_paddings_are_left_to_jax():
  x, kernel = jnp.ones((1, 6, 6, 2)), jnp.ones((3, 3, 2, 2))
  for strides, padding in (((2, 2), [(0, 1), (0, 1)]), ((1, 1), [(0, 0), (0, 0)])):
    ours = convolve(x, kernel, strides, padding, dimension_numbers=LAYOUT)
    expected = jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT)
    np.testing.assert_array_equal(ours, expected)
