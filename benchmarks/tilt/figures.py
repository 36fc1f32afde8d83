"""Draws docs/tilt_*.svg from the results; needs matplotlib.

python -m benchmarks.tilt.figures
"""

from pathlib import Path

import matplotlib
import numpy as np

from benchmarks import record
from benchmarks.selections import part
from benchmarks.tilt.run import HISTOGRAM, PLACE

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path("docs")
COLOURS = {
  "last step only": "tab:blue", "hybrid, KL": "tab:green", "hybrid": "tab:red",
  "GRPO alone": "tab:orange", "back-propagation alone": "tab:purple", "DMD alone": "black",
}  # fmt: skip


def save(figure, name: str) -> None:
  """The same bytes for the same numbers; text stays text."""
  figure.tight_layout()
  with matplotlib.rc_context({"svg.hashsalt": "tilt", "svg.fonttype": "none"}):
    figure.savefig(DOCS / f"tilt_{name}.svg", metadata={"Date": None}, facecolor="white")
  plt.close(figure)


def shifts(rows: list[dict]) -> None:
  figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
  exact = sorted((r["beta"], float(np.linalg.norm(r["exact_shift"]))) for r in rows)
  left.plot(*zip(*exact, strict=True), color="grey", label="closed form")
  for name, fake_updates, colour in (
    ("last step only", 5, "tab:cyan"), ("last step only", 20, "tab:blue"),
    ("hybrid, KL", 5, "tab:green"),
  ):  # fmt: skip
    parts = [r for r in rows if (r["method"], r["fake_updates"]) == (name, fake_updates)]
    betas = [r["beta"] for r in parts]
    style = {"color": colour, "label": f"{name}, {'careful' if fake_updates == 20 else 'quick'}"}
    left.plot(betas, [np.linalg.norm(r["shift"]) for r in parts], "o", **style)
    right.plot(betas, [100 * r["shift_error"] for r in parts], "o", color=colour)
    covariances = [100 * r["covariance_error"] for r in parts]
    right.plot(betas, covariances, "s", color=colour, mfc="none")
  right.axhline(3, color="grey", lw=0.8, label="bar of the mean (dots)")
  right.axhline(5, color="grey", lw=0.8, ls="--", label="bar of the covariance (squares)")
  left.set(xlabel="reward weight beta", ylabel="shift of the mean", title="Gaussian, linear reward")
  right.set(
    xlabel="reward weight beta",
    ylabel="error in %",
    ylim=(0, None),
    title="error against the closed form",
  )
  left.legend(fontsize=8)
  right.legend(fontsize=7)
  save(figure, "gaussian")


def clouds(histograms: dict) -> None:
  names = [
    "teacher", "DMD alone", "exact optimum",
    "last step only", "hybrid, KL", "hybrid", "GRPO alone", "back-propagation alone",
  ]  # fmt: skip
  names = [name for name in names if name in histograms]
  figure, axes = plt.subplots(2, 4, figsize=(10, 5.4), sharex=True, sharey=True)
  side, ends = len(HISTOGRAM) - 1, (HISTOGRAM[0], HISTOGRAM[-1]) * 2
  for name, axis in zip(names, axes.ravel(), strict=False):
    count = np.reshape(histograms[name], (side, side))
    axis.imshow(np.sqrt(count), origin="lower", extent=ends, cmap="Greys", interpolation="none")
    axis.plot(*PLACE.linear, "x", color="tab:red")
    axis.set_title(name, fontsize=10)
  save(figure, "mixture")


def trade(results: list[dict]) -> None:
  figure, axes = plt.subplots(figsize=(7, 4.2))
  family = part("tilted_family")(results)
  points = lambda rows: ([r["mmd_teacher"] for r in rows], [r["reward"] for r in rows])  # noqa: E731
  axes.plot(*points(family), color="grey", label="p exp(b r), exact")
  for name, colour in COLOURS.items():
    rows = [r for r in part("stage2")(results) if r["method"] == name]
    axes.plot(*points(rows), "o-", color=colour, label=name, markersize=4, lw=0.8)
  axes.plot(*points(part("exact")(results)), "k*", label="exact optimum of the loss")
  low = min(r["reward"] for r in family)
  axes.set(xlabel="MMD to the teacher", ylabel="mean reward", title="Mixture of three Gaussians")
  axes.set(ylim=(low - 0.4, 1.2))
  axes.legend(fontsize=8, loc="lower right")
  save(figure, "trade")


def facts(estimators: list[dict]) -> None:
  figure, (first, second, third) = plt.subplots(1, 3, figsize=(11, 3.3))
  (consistency,), (hybrid,), (subgrpo,) = (
    part(name)(estimators) for name in ("consistency", "hybrid", "subgrpo")
  )
  found = consistency["offset_velocity"]
  names = ("squared_violation", "two_sample", "one_sample")
  first.bar(["truth", "two samples", "one sample"], [found[n] for n in names], color="tab:blue")
  first.set(title="Consistency regulariser")
  row = hybrid["rows"][0]
  names = ("finite_difference", "hybrid", "last_step_alone")
  second.bar(
    ["finite\ndifference", "hybrid", "last step\nalone"], [row[n]["mean"] for n in names],
    yerr=[row[n]["error"] for n in names], color="tab:green",
  )  # fmt: skip
  second.set(title="Slope of the expected reward")
  rows = subgrpo["rows"]
  for offset, repeats in ((-0.2, 16), (0.2, 2)):
    pairs = [
      {r["shared_noise"]: r["variance"] for r in rows if r["steps"] == [i, i]
       and r["repeats"] == repeats}
      for i in range(3)
    ]  # fmt: skip
    third.bar(
      np.arange(3) + offset, [p[True] / p[False] for p in pairs], 0.38,
      color="tab:orange" if repeats == 16 else "tab:brown", label=f"{repeats} images a group",
    )  # fmt: skip
  third.axhline(1, color="grey", lw=0.8)
  third.set(xticks=range(3), xlabel="the one trained step", title="Variance, shared / independent")
  third.legend(fontsize=8, loc="upper left")
  save(figure, "estimators")


def main() -> None:
  mixture = record.read("tilt_mixture")
  shifts(part("stage2")(record.read("tilt_gaussian")))
  clouds(part("histograms")(mixture)[0])
  trade(mixture)
  facts(record.read("tilt_estimators"))


if __name__ == "__main__":
  main()
