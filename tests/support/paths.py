"""Where the repository, its configurations and the shipped pipeline are."""

from pathlib import Path

import rtdmd_jax

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
TINY = Path(rtdmd_jax.__file__).parent / "assets/tiny"
