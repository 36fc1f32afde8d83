"""The modules that `python -m` runs."""

from pathlib import Path

import rtdmd_jax

_PACKAGE = Path(rtdmd_jax.__file__).parent
TOOLS = sorted(
  ".".join(path.relative_to(_PACKAGE.parent).with_suffix("").parts).removesuffix(".__main__")
  for path in _PACKAGE.rglob("*.py")
  if '__name__ == "__main__"' in path.read_text()
)
