"""Trains a stage: `python -m rtdmd_jax.main --config=configs/tiny_stage2.py --workdir=DIR`.

Reads the checkpoints, prompts and adapters that the configuration names. Writes checkpoints,
metrics, previews, the exported LoRA and report.html into the workdir. Started again with the same
workdir, a run goes on from its last checkpoint; of a finished one only the report is written anew.

With --check nothing is trained or written: the run is built from shapes alone, rewards of the host
score a grey image, and every problem with its configuration, files, rewards, prompts and devices is
a line. --workdir may be left out then.
"""

import sys

from absl import flags

from rtdmd_jax import cli
from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime import distributed, gpu_memory
from rtdmd_jax.runtime.lock import WorkdirLock


def main(call: cli.Invocation) -> None:
  """Dispatches on `config.stage`; jax is imported only now, so that mistakes are answered fast."""
  call.expect("training", "pretraining")
  if call.flags.check:
    _check(call)
    return
  if call.workdir is None:
    raise UserError(f"--workdir is required: {call.flags['workdir'].help}")
  workdir = cli.make_folder(call.workdir, "--workdir")
  if call.config.get("stage") == "pretrain":
    distributed.check_alone()
    from rtdmd_jax.pretrain.run import run

    with WorkdirLock(workdir):
      print(f"pipeline: {run(call.config, workdir)}")
  else:
    gpu_memory.claim()
    distributed.initialize()
    from rtdmd_jax.train import train

    train(call.config, workdir, allow_config_change=call.flags.allow_config_change)


def _check(call: cli.Invocation) -> None:
  """Prints what would run, and what is wrong; a problem makes the exit code 2."""
  from rtdmd_jax.aot.check import check, show

  report = check(call.config, call.workdir, allow_config_change=call.flags.allow_config_change)
  if code := show(report):
    sys.exit(code)


def define_flags(values: flags.FlagValues) -> None:
  """The tool's own flags."""
  text = "Resume although the objective, the backbone, the adapters or files that are read changed."
  flags.DEFINE_bool("allow_config_change", False, text, flag_values=values)
  flags.DEFINE_bool("check", False, "Only say what would run, and what is wrong.", values)


if __name__ == "__main__":
  sys.exit(cli.run(main, define_flags=define_flags, requires=("config",)))
