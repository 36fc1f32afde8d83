"""Rows of the tables: selected, grouped and compared rows of the results."""

from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np

from benchmarks import record

Rows = list[dict[str, Any]]
PROGRAMS = {1: ("fake_score", "generator"), 2: ("rollout", "fake_score", "policy")}  # of a stage
# What the other variants of a stage are compared with.
REFERENCES = {"stage1": "A-DMD", "stage2": "M = 2 and last step"}
BACKBONES = {
  "sd3": "SD3-M", "sd35": "SD3.5-M", "flux1": "FLUX.1-dev", "flux2": "FLUX.2-klein 4B",
  "flux2_9b": "FLUX.2-klein 9B",
}  # fmt: skip
GPU_SETUPS = ("1x80", "1x141", "8x80")  # of configs/gpus.py
_GIB_GB = 2**30 / 1e9


def programs_by_slice(bounds: Rows) -> Rows:
  """A row per backbone, stage and slice, of one per program; the configs' own batches alone."""
  compiled = {
    (r["backbone"], r["stage"], r["slice"], r["program"]): r["seconds"]
    for r in record.read("hardware_compiled")
  }
  place = lambda row: (row["backbone"], row["stage"], row["slice"])  # noqa: E731
  rows = []
  for (backbone, stage, where), found in groupby(filter(_as_configured, bounds), key=place):
    programs = {row["program"]: row for row in found}
    largest = max(programs.values(), key=lambda row: row["peak_gib"])
    slowest = min(programs.values(), key=lambda row: row["mfu_bound"])
    seconds = [compiled.get((backbone, stage, where, name)) for name in programs]
    rows.append(
      {
        "backbone": backbone, "stage": stage, "slice": where,
        "complete": len(programs) == len(PROGRAMS[stage]),
        "peak_gib": largest["peak_gib"], "limit_gib": largest["limit_gib"],
        "largest": largest["program"],
        "bounds": ", ".join(f"`{k}` {_digits(row['bound_s'])}" for k, row in programs.items()),
        "slowest": _held_to(slowest),
        "compiled": ", ".join(map(str, seconds)) if None not in seconds else None,
      }
    )  # fmt: skip
  return rows


def programs_by_gpus(bounds: Rows) -> Rows:
  """A row per backbone, stage and set-up of GPUs, with the batch settings of `configs/gpus.py`."""
  place = lambda row: (row["backbone"], row["stage"], row["slice"])  # noqa: E731
  rows = []
  chosen = [row for row in bounds if row.get("setting") in GPU_SETUPS]
  for (backbone, stage, where), found in groupby(chosen, key=place):
    programs = {row["program"]: row for row in found}
    largest = max(programs.values(), key=lambda row: row["peak_gib"])
    rows.append(
      {
        "backbone": backbone, "stage": stage, "slice": where,
        "peak_gb": largest["peak_gib"] * _GIB_GB, "limit_gb": largest["limit_gib"] * _GIB_GB,
        "largest": largest["program"],
        "bounds": ", ".join(f"`{k}` {_digits(row['bound_s'])}" for k, row in programs.items()),
        "launches": ", ".join(f"{_count(row['launches'])}" for row in programs.values()),
      }
    )  # fmt: skip
  return rows


def _count(n: float) -> str:
  """A number of launches: 32k, 1.5M."""
  return f"{n / 1e6:.1f}M" if n >= 1e6 else f"{n / 1e3:.0f}k"


def _held_to(row: dict[str, Any]) -> str:
  """The bound of a program's MFU, and what it comes from if not from arithmetic alone."""
  bound = f"{row['mfu_bound']:.0%}"
  return bound if bound == "100%" else f"{bound}: {row['bound_by']} of `{row['program']}`"


def _as_configured(row: dict[str, Any]) -> bool:
  return row.get("setting") in (None, "one device")


def _digits(x: float) -> str:
  return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def memory_and_peaks(memory: Rows) -> Rows:
  """Memory at rest of each backbone, beside the peaks of both stages on 8 and on 64 chips."""
  peaks = programs_by_slice(record.read("hardware_bounds"))
  rows = []
  for row in memory:
    if row["bases"] != "native":
      continue
    family = row["config"].removesuffix("_stage2")
    row = row | {"name": BACKBONES[family], "family": family}
    for count, chips in ((8, "2x4"), (64, "8x8")):
      found = {
        p["stage"]: p for p in peaks
        if p["backbone"] == BACKBONES[family] and p["slice"].endswith(chips)
      }  # fmt: skip
      if 2 in found:
        stages = [
          f"{found[s]['peak_gib']:.2f}" if s in found and found[s]["complete"] else "not known"
          for s in (1, 2)
        ]
        limit = f"{found[2]['limit_gib']:.2f} ({found[2]['slice'].partition(':')[0]})"
        row[f"peaks_{count}"] = f"{stages[0]}, {stages[1]} of {limit}"
    rows.append(row)
  return rows


def ablations(stage: str) -> Callable[[Rows], Rows]:
  """A row per variant of a stage: means over seeds, and differences seed by seed."""

  def rows(results: Rows) -> Rows:
    by_variant: dict[str, dict[int, dict]] = {}
    for row in results:
      if row["stage"] == stage:
        by_variant.setdefault(row["variant"], {})[row["seed"]] = row
    reference = by_variant.get(REFERENCES[stage], {})
    return [
      {"variant": variant, "seeds": len(seeds)} | _means(seeds, reference)
      for variant, seeds in by_variant.items()
    ]

  return rows


def _means(seeds: dict[int, dict], reference: dict[int, dict]) -> dict[str, str]:
  """Mean over seeds; mean, smallest and largest difference from `reference` seed by seed."""
  cells = {}
  for key, digits in (("clipscore", 3), ("geneval", 3), ("distance", 1)):
    cells[key] = f"{np.mean([row[key] for row in seeds.values()]):.{digits}f}"
    pairs = [row[key] - reference[s][key] for s, row in seeds.items() if s in reference]
    mean, low, high = (f"{f(pairs):+.{digits}f}" if pairs else "" for f in (np.mean, min, max))
    compared = pairs and seeds is not reference
    cells[f"{key}_against"] = f"{mean} ({low} to {high})" if compared else ""
  return cells


def part(name: str, keep: Callable[[dict], bool] = lambda row: True) -> Callable[[Rows], Rows]:
  """The rows of one part of a section of benchmarks/tilt."""
  return lambda rows: [row for row in rows if row["part"] == name and keep(row)]


def shifts(rows: Rows) -> Rows:
  """Stage 2 on the Gaussian, with the training in a word."""
  word = {5: "quick", 20: "careful"}
  return [row | {"training": word[row["fake_updates"]]} for row in part("stage2")(rows)]


def cold_starts(rows: Rows) -> Rows:
  """Stage 1 on the mixture, the long run included."""
  rows = [*part("stage1")(rows), *record.read("tilt_long")]
  floor = rows[0]["mmd_by_level"]
  assert list(floor) == ["0.9", "0.75", "0.5", "0.0"]
  names = ("at_0_9", "at_0_75", "at_0_5", "at_0")
  return [row | dict(zip(names, row["mmd_by_level"].values(), strict=True)) for row in rows]


def tilts(rows: Rows) -> Rows:
  """Stage 2 on the mixture: the last stop of each run, and the exact optimum."""
  last = {(row["method"], row["beta"]): row for row in part("stage2")(rows)}
  exact = [row | {"method": "exact optimum"} for row in part("exact")(rows)]
  return [*last.values(), *exact]


def shared_noise(rows: Rows) -> Rows:
  """Variances of the policy gradient: independent and shared noise side by side."""
  (found,) = part("subgrpo")(rows)
  pairs: dict[tuple, dict] = {}
  for row in found["rows"]:
    place = (row["repeats"], row["M"], *row["steps"])
    key = "shared" if row["shared_noise"] else "independent"
    pairs.setdefault(place, {})[key] = row["variance"]
  made = []
  for (images, trained, first, last), pair in pairs.items():
    which = f"step {first + 1}" if first == last else f"{trained} of 3"
    row = {"trained": which, "images": images} | pair
    if "shared" in pair:
      row["ratio"] = pair["shared"] / pair["independent"]
    made.append(row)
  return made


def estimates(rows: Rows) -> Rows:
  """What each estimator should give, what it gives, and what a simpler one gives."""
  (ambient,), (consistency,), (hybrid,) = (
    part(n)(rows) for n in ("ambient", "consistency", "hybrid")
  )
  made = [
    {
      "quantity": f"ambient target, chi2 per cell at s = {level['s']:g}, t = {level['t']:g}",
      "reference": "1", "estimate": f"{level['chi2_per_cell']:.2f}",
    }
    for level in ambient["levels"]
  ]  # fmt: skip
  found = consistency["offset_velocity"]
  made.append(
    {
      "quantity": "consistency violation: nested sampling, two samples, one sample",
      "reference": f"{found['squared_violation']:.5f}",
      "estimate": f"{found['two_sample']:.5f} ± {found['two_sample_error']:.5f}",
      "simpler": f"{found['one_sample']:.3f}",
    }
  )
  for row in hybrid["rows"]:
    cell = lambda key, row=row: f"{row[key]['mean']:.3g} ± {row[key]['error']:.1g}"  # noqa: E731
    made.append(
      {
        "quantity": f"slope of the expected reward, {row['direction']}: finite differences,"
        " hybrid gradient, last step alone",
        "reference": cell("finite_difference"), "estimate": cell("hybrid"),
        "simpler": cell("last_step_alone"),
      }
    )  # fmt: skip
  return made


def against_first(rows: Rows) -> Rows:
  """Quick runs, each with its difference from the first variant's of the same seed."""
  first = {row["seed"]: row for row in rows[:3]}
  made = []
  for row in rows:
    other = first[row["seed"]]
    if row is not other:
      row = row | {f"{key}_against": row[key] - other[key] for key in ("clipscore", "geneval")}
    made.append(row)
  return made


def signed(rows: Rows) -> Rows:
  """Scores as they are, differences between systems with their sign."""
  made = []
  for row in rows:
    sign = "+" if " over " in row["system"] else ""
    cell = lambda key, row=row, sign=sign: f"{row[key]:{sign}.3f} ± {row[f'{key}_error']:.3f}"  # noqa: E731
    made.append({"system": row["system"], "clip": cell("clipscore"), "gen": cell("geneval")})
  return made


def few_rows(rows: Rows) -> Rows:
  """Convolutions and patch embeddings alone, of the parts of a rollout."""
  return [row for row in rows if row["part"].startswith(("convolution", "patches"))]


def flattened(rows: Rows) -> Rows:
  """Rows whose dictionaries of plain values are cells of their own."""
  made = []
  for row in rows:
    nested = {k: v for k, v in row.items() if isinstance(v, dict)}
    made.append(row | {f"{k}_{name}": x for k, v in nested.items() for name, x in v.items()})
  return made
