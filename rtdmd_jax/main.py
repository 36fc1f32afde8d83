"""Trains a stage: `python -m rtdmd_jax.main --config=configs/tiny_stage2.py --workdir=DIR`.

Started again with the same workdir, a run goes on from its last checkpoint.
"""

import sys

from rtdmd_jax import cli


def main(call: cli.Invocation) -> None:
  """Dispatches on `config.stage`; jax is imported only now, so that mistakes are answered fast."""
  if call.config.stage == "pretrain":
    from rtdmd_jax.pretrain.run import run

    print(f"pipeline: {run(call.config, call.workdir)}")
  else:
    from rtdmd_jax.train import train

    train(call.config, call.workdir)


if __name__ == "__main__":
  sys.exit(cli.run(main, requires=("config", "workdir")))
