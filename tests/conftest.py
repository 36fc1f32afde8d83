"""Shared by all tests."""

import os
import sys
from pathlib import Path

# Before jax is imported: no search for accelerators, and steps as deterministic as they can be.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent))
