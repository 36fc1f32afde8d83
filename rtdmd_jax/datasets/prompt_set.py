"""Prompt files as a TFDS dataset: array_record files that `data.prompts` may name.

`python -m rtdmd_jax.datasets.prompt_set --train=prompts/geneval --test=prompts/geneval --out=DIR`
reads prompt files of any kind (`rtdmd_jax.prompts`), prepares the dataset and prints its folder.
Neither preparing nor reading imports TensorFlow.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from absl import flags
from etils import epath

from rtdmd_jax import cli
from rtdmd_jax.errors import UserError
from rtdmd_jax.prompts import load_prompts


@dataclasses.dataclass
class PromptSetConfig(tfds.core.BuilderConfig):
  """Where the prompts come from.

  Attributes:
    train: prompt file or folder of the split `train`; empty for none.
    test: that of the split `test`.
  """

  train: str = ""
  test: str = ""


class PromptSet(tfds.core.GeneratorBasedBuilder):
  """The dataset `prompt_set`: features prompt and record, the whole record as JSON, in order."""

  # TFDS would infer this with importlib_resources, which it uses but does not install.
  code_path = epath.Path(__file__)
  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = []

  def __init__(self, **kwargs):
    super().__init__(**{"file_format": "array_record"} | kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    features = {"prompt": tfds.features.Text(), "record": tfds.features.Text()}
    return tfds.core.DatasetInfo(
      builder=self,
      description="Prompts of text-to-image models and what a reward needs to know of them.",
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    sources = {"train": self.builder_config.train, "test": self.builder_config.test}
    return {
      split: self._generate_examples(source, split) for split, source in sources.items() if source
    }

  def _generate_examples(self, source: str, split: str) -> Iterator[tuple[int, dict[str, str]]]:
    for number, prompt in enumerate(load_prompts(source, split=split, metadata=True)):
      yield number, {"prompt": prompt.text, "record": json.dumps(prompt.record)}


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
  config = PromptSetConfig(name=given.name, train=given.train, test=given.test)
  builder = PromptSet(data_dir=given.out, config=config)
  folder = Path(builder.data_path)
  if folder.exists():
    raise UserError(f"{folder} exists; give another --name or delete that folder.")
  builder.download_and_prepare()
  counts = ", ".join(f"{name} {split.num_examples}" for name, split in builder.info.splits.items())
  print(f"{folder}: {counts}")


if __name__ == "__main__":
  sys.exit(cli.run(main, define_flags=define_flags, requires=("out",)))
