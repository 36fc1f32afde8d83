"""TFDS builder of prompt sets; see `rtdmd_jax.datasets.prompt_set`."""

import dataclasses
import json
from collections.abc import Iterator

import tensorflow_datasets as tfds
from etils import epath

from rtdmd_jax.datasets.prompts import load_prompts


@dataclasses.dataclass
class PromptSetConfig(tfds.core.BuilderConfig):
  """The sources of the prompts.

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
