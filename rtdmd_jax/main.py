"""Trains a stage: `python -m rtdmd_jax.main --config=configs/tiny_stage2.py --workdir=DIR`.

Started again with the same workdir, a run goes on from its last checkpoint.
"""

import sys

from absl import flags

from rtdmd_jax import cli


def main(call: cli.Invocation) -> None:
  """Dispatches on `config.stage`; jax is imported only now, so that mistakes are answered fast."""
  if call.config.stage == "pretrain":
    from rtdmd_jax.pretrain.run import run

    print(f"pipeline: {run(call.config, call.workdir)}")
  else:
    from rtdmd_jax.train import train

    train(call.config, call.workdir, allow_config_change=call.flags.allow_config_change)


def define_flags(values: flags.FlagValues) -> None:
  """The tool's own flags."""
  text = "Resume although the objective, the backbone or the adapters changed."
  flags.DEFINE_bool("allow_config_change", False, text, flag_values=values)


if __name__ == "__main__":
  sys.exit(cli.run(main, define_flags=define_flags, requires=("config", "workdir")))
