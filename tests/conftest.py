"""Shared by all tests."""

import os

import pytest

from tests.support.xla_flags import xla_flags

# Before jax is imported: no search for accelerators, and programs that compile twice as fast.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", xla_flags())
# No test asks Hugging Face's hub, whatever a configuration names.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def compile_quickly():
  """Entry points under test switch optimizations on, which must not slow down the tests after."""
  yield
  import jax

  name = "jax_disable_most_optimizations"
  jax.config.update(name, os.environ[name.upper()] == "1")
