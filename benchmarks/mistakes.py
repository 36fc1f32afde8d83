"""What is wrong with the objects that prompts ask for: cold start beside teacher.

python -m benchmarks.mistakes --config=configs/tiny_stage2.py --images=2

Shares of the entries of held-out GenEval records of `--tag`, judged by the pixel detector.
"""

import argparse
from collections import Counter

import jax
import numpy as np

from benchmarks import record, tables
from rtdmd_jax.config import load_config
from rtdmd_jax.datasets.geneval_records import TAGS
from rtdmd_jax.evaluate import systems
from rtdmd_jax.evaluate.evaluator import Evaluator
from rtdmd_jax.rewards.host import geneval
from rtdmd_jax.rewards.host.shapes_detector import detect_shapes
from rtdmd_jax.runtime import sharding
from rtdmd_jax.training.setup import build

VERDICTS = (
  "right",
  "washed out",
  "too few",
  "too many",
  "colour of another object",
  "other colour",
)
KEYS = ("right", "washed_out", "too_few", "too_many", "colour_of_another", "other_colour")
# Distance from the background, in 8-bit RGB units, below which an image is washed out: between that
# of pink at full contrast (130) and that of the strongest washed-out colour (100).
MIN_CONTRAST = 115.0


def washed_out(images: np.ndarray) -> np.ndarray:
  """Which of the images [B, H, W, 3] have no pixels far from their background [B]."""
  background = np.median(images[:, 0], axis=1)[:, None, None]
  distance = np.linalg.norm(images.astype(np.float32) - background, axis=-1)
  return np.percentile(distance.reshape(len(images), -1), 98, axis=1) < MIN_CONTRAST


def verdict(need: dict, record: dict, objects: dict) -> str:
  """One of `VERDICTS` on one entry of a record; without a colour asked, counts alone decide."""
  found, count = objects.get(need["class"], []), need["count"]
  if len(found) != count:
    return "too few" if len(found) < count else "too many"
  wrong = [d.color for d in found if d.color != need.get("color", d.color)]
  if not wrong:
    return "right"
  others = {entry.get("color") for entry in record["include"]}
  return "colour of another object" if wrong[0] in others else "other colour"


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--config", required=True)
  parser.add_argument("--images", type=int, default=2, help="of a prompt")
  parser.add_argument("--tag", choices=TAGS, default="color_attr")
  record.add_flag(parser)
  options, overrides = parser.parse_known_args()
  config = load_config(options.config, [o.removeprefix("--config.") for o in overrides])
  with jax.set_mesh(sharding.make_mesh(**config.mesh)):
    setup = build(config)
    evaluator = Evaluator(setup, config)
    prompts = [p for p in setup.held_out if p.record["tag"] == options.tag] * options.images
    cold = systems.generator(setup, config, "cold start", None)
    rows = []
    for system in (cold, systems.teacher(setup, config)):
      images = evaluator.images(system, prompts)
      counts = Counter()
      judged = zip(prompts, detect_shapes(images), washed_out(images), strict=True)
      for prompt, detections, pale in judged:
        objects = geneval.confident(detections, options.tag)
        found = [verdict(need, prompt.record, objects) for need in prompt.record["include"]]
        counts.update("washed out" if pale and v == "too few" else v for v in found)
      shares = {key: counts[v] / counts.total() for key, v in zip(KEYS, VERDICTS, strict=True)}
      rows.append({"system": system.name} | shares)
    tables.report("mistakes", rows, options.save, ("system",))


if __name__ == "__main__":
  main()
