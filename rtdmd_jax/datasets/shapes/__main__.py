"""Draws the shapes set. Reads nothing; writes prompt files (--out) or a TFDS dataset (--tfds)."""

import argparse
import sys
from pathlib import Path

from rtdmd_jax import cli
from rtdmd_jax.datasets.shapes.records import write_prompt_files


def _prepare(directory: str, train_images: int, test_images: int, washed_out: float) -> Path:
  """Draws and writes the dataset; returns the directory `tfds.builder_from_directory` reads."""
  from rtdmd_jax.datasets.shapes.builder import Shapes, ShapesConfig

  name = f"train{train_images}_test{test_images}" + (f"_washed{washed_out}" if washed_out else "")
  config = ShapesConfig(
    name=name, train_images=train_images, test_images=test_images, washed_out=washed_out
  )
  builder = Shapes(data_dir=directory, config=config)
  builder.download_and_prepare()
  return Path(builder.data_path)


def main(argv: list[str] | None = None) -> None:
  """Parses the command line and writes what it asks for."""
  parser = argparse.ArgumentParser(prog="python -m rtdmd_jax.datasets.shapes", description=__doc__)
  parser.add_argument("--out", help="directory of train_metadata.jsonl and test_metadata.jsonl")
  parser.add_argument("--tfds", help="data_dir of the TFDS dataset (array_record files)")
  parser.add_argument("--train-images", type=int, default=50_000, help="default: %(default)s")
  parser.add_argument("--test-images", type=int, default=2_000, help="default: %(default)s")
  parser.add_argument(
    "--washed-out",
    type=float,
    default=0.0,
    help="share of the training images that have little contrast, 0 to 1 (default: %(default)s)",
  )
  arguments = parser.parse_args(argv)
  if arguments.out is None and arguments.tfds is None:
    parser.error("give --out, --tfds or both")
  if arguments.train_images < 1 or arguments.test_images < 1:
    parser.error("--train-images and --test-images must be at least 1")
  if not 0.0 <= arguments.washed_out <= 1.0:
    parser.error(f"--washed-out is a share from 0 to 1, got {arguments.washed_out}")
  if arguments.out is not None:
    out = cli.make_folder(arguments.out, "--out")
    for path, count in write_prompt_files(out).items():
      print(f"{path}: {count} records")
  if arguments.tfds is not None:
    cli.make_folder(arguments.tfds, "--tfds")
    try:
      counts = arguments.train_images, arguments.test_images
      path = _prepare(arguments.tfds, *counts, arguments.washed_out)
    except ModuleNotFoundError as error:
      parser.error(
        f"--tfds needs {error.name}; pip install tensorflow-datasets array_record pillow"
      )
    print(f"{path}: {arguments.train_images} + {arguments.test_images} images")


if __name__ == "__main__":
  sys.exit(cli.guard(main))
