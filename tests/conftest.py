"""Shared by all tests."""

import os

# Before jax is imported: no search for accelerators, and programs that compile twice as fast.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
