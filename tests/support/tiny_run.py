"""Runs of the shipped tiny pipeline through the entry point, of a few prompts each."""

from pathlib import Path

from rtdmd_jax import cli, main
from rtdmd_jax.config import load_config
from tests.support.paths import CONFIGS

SMALL = [
  "--config.batch.prompts=2",
  "--config.batch.images_per_prompt=2",
  "--config.batch.micro_batches=1",
  "--config.eval.final_prompts=4",
  "--config.eval.prompts=4",
  "--config.eval.chunk=4",
  "--config.eval.preview=2",
  "--config.eval.teacher_steps=2",
  "--config.train.log_every=1",
  "--config.ema.decay=0.9",  # an average that differs from its weights
]


def run(workdir, *overrides, config="tiny_stage2.py"):
  argv = ["main", f"--config={CONFIGS / config}", f"--workdir={workdir}", *overrides]
  return cli.run(main.main, argv, define_flags=main.define_flags, requires=("config", "workdir"))


def tiny_pipeline():
  return Path(load_config(str(CONFIGS / "tiny_stage2.py")).model.pretrained)


def expect_mistake(capsys, code, *words):
  error = capsys.readouterr().err
  assert code == 2
  assert error.startswith("error: ") and error.count("\n") == 1, error
  for word in words:
    assert word in error, error
