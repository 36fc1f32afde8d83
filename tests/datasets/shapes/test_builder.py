import json
import subprocess
import sys

import numpy as np
import pytest

from rtdmd_jax.datasets.shapes import __main__ as cli
from rtdmd_jax.datasets.shapes.draw import draw
from rtdmd_jax.datasets.shapes.grammar import TAGS, all_records, split
from rtdmd_jax.rewards.host.geneval import GenEval
from rtdmd_jax.rewards.host.shapes_detector import detect_shapes

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  from rtdmd_jax.datasets.shapes.builder import Shapes, ShapesConfig

  config = ShapesConfig(name="small", train_images=60, test_images=24, seed=5)
  builder = Shapes(data_dir=tmp_path_factory.mktemp("tfds"), config=config)
  builder.download_and_prepare()
  return builder.data_path


def _read(directory, name):
  source = tfds.builder_from_directory(directory).as_data_source(split=name)
  return [source[i] for i in range(len(source))]


def test_neither_writing_nor_reading_imports_tensorflow(tmp_path):
  script = f"""
import sys
import tensorflow_datasets as tfds
from rtdmd_jax.datasets.shapes.__main__ import main
main(["--tfds", {str(tmp_path)!r}, "--train-images", "6", "--test-images", "6"])
path = {str(tmp_path / "shapes" / "train6_test6" / "1.1.0")!r}
print(tfds.builder_from_directory(path).as_data_source(split="test")[5]["prompt"].decode())
sys.exit("tensorflow" in sys.modules)
"""
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "6 + 6 images" in done.stdout
  assert done.stdout.splitlines()[-1].startswith("a photo of ")


@pytest.mark.parametrize(("name", "count"), [("train", 60), ("test", 24)])
def test_reads_back_what_the_record_says(directory, name, count):
  examples = _read(directory, name)
  assert len(examples) == count
  records = [json.loads(e["record"]) for e in examples]
  images = np.stack([e["image"] for e in examples])
  assert images.shape == (count, 64, 64, 3) and images.dtype == np.uint8
  for example, record in zip(examples, records, strict=True):
    assert example["prompt"].decode() == record["prompt"]
    assert example["tag"].decode() == record["tag"]
  tags = [record["tag"] for record in records]
  assert [tags.count(tag) for tag in TAGS] == [count // 6] * 6
  scores = GenEval(detect_shapes)(images, [r["prompt"] for r in records], records)
  np.testing.assert_array_equal(scores["strict_accuracy"], 1.0)


def test_splits_keep_to_their_prompts(directory):
  train, held_out = ({r["prompt"] for r in side} for side in split(all_records()))
  assert {e["prompt"].decode() for e in _read(directory, "train")} <= train
  assert {e["prompt"].decode() for e in _read(directory, "test")} <= held_out


def test_an_image_depends_on_seed_and_index_only(directory):
  record = split(all_records())[0][0]
  expected, _ = draw(record, np.random.default_rng((5, 0, 0)))
  images = [e["image"] for e in _read(directory, "train")]
  assert any(np.array_equal(image, expected) for image in images)


def test_a_share_of_the_training_images_is_washed_out(tmp_path):
  from rtdmd_jax.datasets.shapes.builder import Shapes, ShapesConfig

  config = ShapesConfig(name="washed", train_images=60, test_images=24, washed_out=0.4)
  builder = Shapes(data_dir=tmp_path, config=config)
  builder.download_and_prepare()
  contrast = {
    name: np.array([np.ptp(e["image"].astype(int)) for e in _read(builder.data_path, name)])
    for name in ("train", "test")
  }
  assert (contrast["test"] > 100).all()  # a palette colour against the background
  assert 0.2 < np.mean(contrast["train"] < 80) < 0.6


@pytest.mark.parametrize(
  "argv", [[], ["--tfds", "x", "--test-images", "0"], ["--tfds", "x", "--washed-out", "40"]]
)
def test_command_line_mistakes_exit_with_2(argv):
  with pytest.raises(SystemExit) as stop:
    cli.main(argv)
  assert stop.value.code == 2
