"""Draws what a run ended with: its systems side by side, the first prompts of its evaluation.

  python -m benchmarks.result_images runs/tiny --out=docs/result_images.png

docs/result_images.png shows a run of configs/tiny_stage2.py.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from rtdmd_jax.report.grids import save_png, side_by_side


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("run", type=Path, help="workdir with evaluation.json and evaluation/")
  parser.add_argument("--images", type=int, default=8, help="a system")
  parser.add_argument("--out", type=Path, default=Path("docs/result_images.png"))
  args = parser.parse_args()
  evaluation = json.loads((args.run / "evaluation.json").read_text())
  systems = {
    f"{system['name'].split(',')[0]}, {system['steps']} steps": np.stack(
      [
        np.asarray(Image.open(args.run / "evaluation" / system["name"] / f"{i}.png"))
        for i in range(args.images)
      ]
    )
    for system in evaluation["systems"]
  }
  save_png(args.out, side_by_side(systems, evaluation["prompts"][: args.images]))


if __name__ == "__main__":
  main()
