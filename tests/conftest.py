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


# Files whose tests take minutes each.
_LONG = ("rehearsal/", "test_docs.py", "test_multihost.py", "test_sharding.py", "test_train")


def pytest_collection_modifyitems(items):
  """Tests of minutes come first, so that none of them is left for one worker at the end."""
  items.sort(key=lambda item: not any(name in item.nodeid for name in _LONG))


@pytest.fixture(autouse=True)
def compile_quickly():
  """Entry points under test switch optimizations on, which must not slow down the tests after."""
  yield
  import jax

  name = "jax_disable_most_optimizations"
  jax.config.update(name, os.environ[name.upper()] == "1")
