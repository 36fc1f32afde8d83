"""The command `python -m rtdmd_jax.evaluate`."""

import sys

from rtdmd_jax import cli
from rtdmd_jax.evaluate.suite import define_flags, main

if __name__ == "__main__":
  sys.exit(cli.run(main, define_flags=define_flags, requires=("config", "workdir")))
