"""Shared by all tests."""

import os

# Before jax is imported: no search for accelerators, and steps as deterministic as they can be.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
