"""Reward-tilted distribution matching distillation of flow transformers, in JAX and Flax."""

import sys

# Any Python 3 can read this file, so that one which is too old is told so.
if sys.version_info < (3, 11):  # noqa: UP036
  _sentence = f"rtdmd_jax needs Python 3.11 or newer; this is {sys.version.split()[0]}"
  if sys.argv[:1] == ["-m"]:  # a tool: no traceback
    sys.stderr.write("error: " + _sentence + "\n")
    sys.exit(2)
  raise ImportError(_sentence)

__version__ = "0.1.0"
