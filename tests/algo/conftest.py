"""Shared by the tests of the mathematics."""

import jax
import pytest


@pytest.fixture(autouse=True)
def explicit_broadcasting():
  """A [B] beside a [B, H, W, C] is an error here; networks add biases to trailing axes."""
  with jax.numpy_rank_promotion("raise"):
    yield
