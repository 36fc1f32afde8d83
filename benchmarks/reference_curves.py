"""Draws what healthy curves look like, from one run of each stage; needs matplotlib.

  python -m benchmarks.reference_curves runs/stage1 runs/stage2 --out=docs/reference_curves.svg

docs/reference_curves.svg shows runs of configs/tiny_stage1.py and configs/tiny_stage2.py.
"""

import argparse
from pathlib import Path

import matplotlib

from rtdmd_jax.runtime.metrics import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# A panel's curves; the first stage's row, then the second's.
PANELS = (
  (
    ("loss/generator",),
    ("loss/fake_score", "loss/consistency"),
    ("generator/grad_norm", "fake_score/grad_norm"),
    ("eval/clipscore", "eval/geneval"),
  ),
  (
    ("loss/policy",),
    ("reward/clipscore", "reward/geneval"),
    ("reward_std/clipscore", "reward_std/geneval"),
    ("eval/clipscore", "eval/geneval"),
  ),
)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("runs", nargs=2, type=Path, help="workdirs of a stage 1 and a stage 2")
  parser.add_argument("--out", type=Path, default=Path("docs/reference_curves.svg"))
  args = parser.parse_args()
  figure, axes = plt.subplots(2, 4, figsize=(12, 5))
  for stage, (run, row) in enumerate(zip(args.runs, PANELS, strict=True), start=1):
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "scalars" in line]
    for axis, names in zip(axes[stage - 1], row, strict=True):
      for name in names:
        points = [(li["step"], li["scalars"][name]) for li in lines if name in li["scalars"]]
        marker = "." if len(points) < 10 else ""
        axis.plot(*zip(*points, strict=True), lw=1, marker=marker, label=name)
      if "grad_norm" in names[0] or "fake_score" in names[0]:
        axis.set_yscale("log")
      axis.set_xlabel(f"step of stage {stage}")
      axis.legend(fontsize=8)
  figure.tight_layout()
  # The same bytes for the same numbers; text stays text.
  with matplotlib.rc_context({"svg.hashsalt": "curves", "svg.fonttype": "none"}):
    figure.savefig(args.out, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
  main()
