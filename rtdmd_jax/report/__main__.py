"""The command `python -m rtdmd_jax.report`."""

import sys

from rtdmd_jax import cli
from rtdmd_jax.report.page import main

if __name__ == "__main__":
  sys.exit(cli.run(main, shared=("workdir",), positional=True))
