"""Draws docs/tilt_*.png from results.json and the samples of the last run; needs matplotlib.

python -m benchmarks.tilt.figures
"""

import json
from pathlib import Path

import matplotlib
import numpy as np

from benchmarks.tilt.run import RESULTS, SAMPLES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path("docs")
COLOURS = {
  "last step only": "tab:blue", "hybrid, KL": "tab:green", "hybrid": "tab:red",
  "GRPO alone": "tab:orange", "back-propagation alone": "tab:purple", "DMD alone": "black",
}  # fmt: skip


def save(figure, name: str) -> None:
  figure.tight_layout()
  figure.savefig(DOCS / f"tilt_{name}.png", dpi=80)
  plt.close(figure)


def shifts(rows: list[dict]) -> None:
  figure, axes = plt.subplots(figsize=(5, 3.6))
  exact = sorted((r["beta"], np.linalg.norm(r["exact_shift"])) for r in rows)
  axes.plot(*zip(*exact, strict=True), color="grey", label="closed form")
  for name in ("last step only", "hybrid, KL"):
    points = [(r["beta"], np.linalg.norm(r["shift"])) for r in rows if r["method"] == name]
    axes.plot(*zip(*points, strict=True), "o", color=COLOURS[name], label=name)
  axes.set(xlabel="reward weight", ylabel="shift of the mean", title="Gaussian, linear reward")
  axes.legend()
  save(figure, "gaussian")


def clouds() -> None:
  names = [
    "teacher", "DMD alone", "exact optimum",
    "last step only", "hybrid, KL", "hybrid", "GRPO alone", "back-propagation alone",
  ]  # fmt: skip
  samples, edges = np.load(SAMPLES / "samples.npz"), np.linspace(-3, 3, 61)
  figure, axes = plt.subplots(2, 4, figsize=(10, 5.4), sharex=True, sharey=True)
  for name, axis in zip(names, axes.ravel(), strict=True):
    count = np.histogram2d(*samples[name].T, bins=(edges, edges))[0].T
    axis.imshow(np.sqrt(count), origin="lower", extent=(-3, 3, -3, 3), cmap="Greys")
    axis.plot(0.4, 1.4, "x", color="tab:red")
    axis.set_title(name, fontsize=10)
  save(figure, "mixture")


def trade(results: dict) -> None:
  figure, axes = plt.subplots(figsize=(6, 4))
  family = results["tilted_family"]
  axes.plot(
    [r["mmd_teacher"] for r in family], [r["reward"] for r in family], color="grey",
    label="p exp(b r), exact",
  )  # fmt: skip
  for name, colour in COLOURS.items():
    rows = [r for r in results["stage2"] if r["method"] == name]
    points = [(r["mmd_teacher"], r["reward"]) for r in rows]
    axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name, markersize=4)
  rows = [r for r in results["exact"] if r["end"] == 400]
  axes.plot(
    [r["mmd_teacher"] for r in rows], [r["reward"] for r in rows], "k*", label="exact optimum"
  )
  low = min(r["reward"] for r in family)
  axes.set(
    xlabel="MMD to the teacher", ylabel="mean reward", title="Mixture", ylim=(low - 0.5, 1.2)
  )
  axes.legend(fontsize=8)
  save(figure, "trade")


def variances(estimators: dict) -> None:
  figure, panels = plt.subplots(1, 2, figsize=(9, 3))
  for axes, key, title in zip(
    panels, ("subgrpo", "subgrpo_linear"), ("quadratic reward", "linear reward"), strict=True
  ):
    rows = [r for r in estimators[key]["rows"] if r["steps"][0] == r["steps"][1]]
    for offset, shared in ((-0.2, False), (0.2, True)):
      parts = [r for r in rows if r["shared_noise"] == shared]
      axes.bar(
        [r["steps"][0] + offset for r in parts], [r["variance"] for r in parts], 0.38,
        color="tab:blue" if shared else "lightgrey", label="shared" if shared else "independent",
      )  # fmt: skip
    axes.set(xticks=range(3), xlabel="trained step", ylabel="variance", title=title)
    axes.legend(fontsize=8)
  save(figure, "variance")


def main() -> None:
  results = json.loads(RESULTS.read_text())
  shifts(results["gaussian"]["stage2"])
  clouds()
  trade(results["mixture"])
  variances(results["estimators"])


if __name__ == "__main__":
  main()
