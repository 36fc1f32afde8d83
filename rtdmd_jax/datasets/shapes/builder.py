"""TFDS builder of the shapes set: array_record files, prepared and read without TensorFlow.

TFDS encodes a NumPy image with TensorFlow but a PIL image with PIL, and reads either with PIL; so
images are handed over as PIL images and neither `download_and_prepare` nor `as_data_source`
imports TensorFlow (`as_dataset` does). Needs `tensorflow-datasets`, `array_record` and `pillow`.
"""

import dataclasses
import json
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from rtdmd_jax.datasets.shapes.draw import SIZE, draw, draw_contrast
from rtdmd_jax.datasets.shapes.grammar import TAGS, all_records, split

_DESCRIPTION = (
  "Drawn 64x64 images of coloured shapes on light grey, captioned in GenEval's prompt grammar. "
  "The prompts of the test split, and rewordings of their scenes, do not occur in training."
)


@dataclasses.dataclass
class ShapesConfig(tfds.core.BuilderConfig):
  """Settings of the drawn images.

  Attributes:
    train_images: images of the split `train`.
    test_images: images of the split `test`, whose prompts are held out.
    washed_out: share of the training images that have little contrast.
    seed: of all randomness; the same seed gives the same images, whatever the counts.
  """

  train_images: int = 50_000
  test_images: int = 2_000
  washed_out: float = 0.0
  seed: int = 0


class Shapes(tfds.core.GeneratorBasedBuilder):
  """The dataset `shapes`: features image `[64, 64, 3]` uint8, prompt, tag and record (JSON).

  `Shapes(data_dir=..., config=ShapesConfig(name="small", train_images=600))` prepares other sizes
  than the default; each configuration has a directory of its own.
  """

  # TFDS would infer this with importlib_resources, which it uses but does not install.
  code_path = epath.Path(__file__)
  VERSION = tfds.core.Version("1.1.0")
  BUILDER_CONFIGS = [ShapesConfig(name="full", description="50,000 training images")]

  def __init__(self, **kwargs):
    super().__init__(**{"file_format": "array_record"} | kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict(
      {
        "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
        "prompt": tfds.features.Text(),
        "tag": tfds.features.Text(),
        "record": tfds.features.Text(),
      }
    )
    return tfds.core.DatasetInfo(builder=self, description=_DESCRIPTION, features=features)

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    config = self.builder_config
    train, held_out = split(all_records())
    return {
      "train": self._generate_examples(
        train, config.train_images, (config.seed, 0), config.washed_out
      ),
      "test": self._generate_examples(held_out, config.test_images, (config.seed, 1), 0.0),
    }

  def _generate_examples(
    self, records: list[dict], count: int, seed: tuple[int, ...], washed_out: float
  ) -> Iterator[tuple[int, dict[str, object]]]:
    """Yields `(index, example)`: the six tags equally often, the prompts of a tag in turn."""
    by_tag = [[r for r in records if r["tag"] == tag] for tag in TAGS]
    for index in range(count):
      turn, tag = divmod(index, len(TAGS))
      record = by_tag[tag][turn % len(by_tag[tag])]
      rng = np.random.default_rng((*seed, index))
      contrast = draw_contrast(washed_out, rng)
      image, _ = draw(record, rng, contrast=contrast)
      yield (
        index,
        {
          "image": Image.fromarray(image),
          "prompt": record["prompt"],
          "tag": record["tag"],
          "record": json.dumps(record),
        },
      )
