"""Heads split off and joined: the numbers of a reshape, on a TPU by whole tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.models.heads import join_heads, split_heads
from rtdmd_jax.runtime import sharding


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
@pytest.mark.parametrize(
  "length, width, tiles", [(16, 128, True), (12, 128, False), (16, 64, False)]
)
def test_the_numbers_are_those_of_a_reshape(monkeypatch, platform, length, width, tiles):
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  x = jnp.arange(2 * length * 3 * width, dtype=jnp.float32).reshape(2, length, 3 * width)
  split = split_heads(x, 3)
  np.testing.assert_array_equal(split, x.reshape(2, length, 3, width))
  np.testing.assert_array_equal(join_heads(split), x)
  moves = str(jax.make_jaxpr(lambda x: join_heads(split_heads(x, 3)))(x)).count("transpose")
  assert (moves > 0) == (tiles and platform == "tpu")
