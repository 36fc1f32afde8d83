"""Prompt files as a TFDS dataset: array_record files that `data.prompts` may name.

`python -m rtdmd_jax.datasets.prompt_set --train=prompts/geneval --test=prompts/geneval --out=DIR`
reads prompt files of any kind (docs/data.md), writes the dataset and prints its folder. Neither
writing nor reading it imports TensorFlow.
"""

import re
import sys
from pathlib import Path

from absl import flags

from rtdmd_jax import cli
from rtdmd_jax.datasets.prompts import load_prompts
from rtdmd_jax.errors import UserError


def define_flags(values: flags.FlagValues) -> None:
  """Adds this tool's flags."""
  flags.DEFINE_string("train", "", "Prompt file or folder of the split train.", values)
  flags.DEFINE_string("test", "", "Prompt file or folder of the split test.", values)
  flags.DEFINE_string("out", None, "Folder of datasets (TFDS's data_dir).", values)
  flags.DEFINE_string("name", "prompts", "Of this set; a folder of --out/prompt_set.", values)


def main(call: cli.Invocation) -> None:
  """Prepares the dataset; one of the same name stays as it is."""
  given = call.flags
  if not given.train and not given.test:
    raise UserError("give --train, --test or both.")
  if not re.fullmatch(r"[\w.-]*\w[\w.-]*", given.name):
    raise UserError(f"--name={given.name}: use letters, digits, dots, dashes and underscores.")
  for split in ("train", "test"):  # mistakes come before anything is written
    if source := getattr(given, split):
      load_prompts(source, split=split, metadata=True)
  from rtdmd_jax.datasets.prompt_builder import PromptSet, PromptSetConfig  # takes seconds

  config = PromptSetConfig(name=given.name, train=given.train, test=given.test)
  cli.make_folder(given.out, "--out")
  builder = PromptSet(data_dir=given.out, config=config)
  folder = Path(builder.data_path)
  if folder.exists():
    raise UserError(f"{folder} exists; give another --name or delete that folder.")
  builder.download_and_prepare()
  counts = ", ".join(f"{name} {split.num_examples}" for name, split in builder.info.splits.items())
  print(f"{folder}: {counts}")


if __name__ == "__main__":
  sys.exit(cli.run(main, define_flags=define_flags, requires=("out",), shared=()))
