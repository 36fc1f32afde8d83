"""Shared by the tests of training."""

import jax
import pytest

# These load real networks, which add biases to trailing axes.
_NETWORKS = ("test_setup", "test_stored_run")


@pytest.fixture(autouse=True)
def explicit_broadcasting(request):
  """A [B] beside a [B, H, W, C] is an error in a training step."""
  if request.path.stem in _NETWORKS:
    yield
    return
  with jax.numpy_rank_promotion("raise"):
    yield
