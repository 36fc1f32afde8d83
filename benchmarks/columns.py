"""The tables of the pages: from which result, with which columns and rows."""

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any, NamedTuple

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


class Table(NamedTuple):
  """A table of a page.

  Attributes:
    result: the file in benchmarks/results/, without its ending.
    columns: by title, what `str.format` makes a cell of a row with.
    rows: maps the rows of the result to those of the table.
  """

  result: str
  columns: dict[str, str]
  rows: Callable[[Rows], Iterable[dict[str, Any]]] = list


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


_SCORES = {
  "CLIPScore": "{clipscore:.3f} ± {clipscore_error:.3f}",
  "GenEval, soft": "{geneval:.3f} ± {geneval_error:.3f}",
}
_ABLATION = {
  "variant": "{variant}", "seeds": "{seeds}", "CLIPScore": "{clipscore}",
  "against the reference": "{clipscore_against}", "GenEval, soft": "{geneval}",
  "against it": "{geneval_against}", "distance to the teacher": "{distance}",
  "against it ": "{distance_against}",
}  # fmt: skip
_AT_REST = {f"{n} device{'s' * (n > 1)}": f"{{devices_{n}:.1f}}" for n in (1, 4, 8, 16, 64)}
_TILT = {
  "method": "{method}", "beta": "{beta}", "updates": "{updates}", "reward": "{reward:.2f}",
  "b": "{b:.2f}", "MMD to the teacher": "{mmd_teacher:.3f}",
  "to the tilted law": "{mmd_tilted:.3f}", "ratio": "{ratio:.2f}",
}  # fmt: skip

TABLES = {
  "quick_run": Table(
    "quick_run", {"system": "{system}", "CLIPScore": "{clip}", "GenEval, soft": "{gen}"}, signed
  ),
  "memory_and_peaks": Table(
    "memory_by_mesh",
    {
      "backbone": "{name}",
      "configs": "`{family}_stage1.py`, `{family}_stage2.py`",
      "1 device": "{devices_1:.1f}",
      "8 devices": "{devices_8:.1f}",
      "64 devices": "{devices_64:.1f}",
      "peaks of stage 1, stage 2 in GiB on 8 TPU chips": "{peaks_8}",
      "on 64 TPU chips": "{peaks_64}",
    },
    memory_and_peaks,
  ),
  "memory_by_mesh": Table(
    "memory_by_mesh",
    {"config": "`{config}`", "bases": "{bases}"}
    | _AT_REST
    | {
      "on one: transformers, training, text encoders, rewards and autoencoder": (
        "{transformers:.1f}, {training:.1f}, {text_encoders:.1f}, {rewards_and_autoencoder:.1f}"
      )
    },
  ),
  "int8_error": Table(
    "int8_error",
    {
      "mean of 8 noise levels (largest)": "{network}",
      "bfloat16": "{bfloat16:.2%} ({bfloat16_largest:.2%})",
      "int8": "{int8:.2%} ({int8_largest:.2%})",
      "bfloat16 and int8": "{both:.2%} ({both_largest:.2%})",
    },
  ),
  "hardware_fit": Table(
    "hardware_bounds",
    {
      "backbone": "{backbone}",
      "stage": "{stage}",
      "slice": "{slice}",
      "highest peak GiB of HBM": "{peak_gib:.2f} of {limit_gib:.2f}, `{largest}`",
      "each program takes at least s": "{bounds}",
      "lowest MFU bound": "{slowest}",
      "compiled in s": "{compiled}",
    },
    programs_by_slice,
  ),
  "hardware_bounds": Table(
    "hardware_bounds",
    {
      "program": "`{program}`",
      "slice": "{slice}",
      "TFLOP a device": "{tflop:digits}",
      "traffic TB": "{traffic_tb:digits}",
      "sent GB": "{sent_gb:digits}",
      "peak GiB of HBM, no code": "{peak_gib:.2f} of {limit_gib:.2f}",
      "bound s": "{bound_s:digits}",
      "by": "{bound_by}",
      "MFU at most": "{mfu_bound:.0%}",
    },
  ),
  "no_recomputation": Table(
    "no_recomputation",
    {
      "program": "`{program}`",
      "batch": "{batch}",
      "TFLOP a device": "{tflop:,.1f}",
      "temporaries asked for, GiB": "{temporaries_gib:.2f}",
      "available, GiB": "{limit_gib:.2f}",
    },
  ),
  "attention_memory": Table(
    "attention_memory",
    {
      "kernel": "{kernel}",
      "tokens x width of a head": "{tokens_and_width}",
      "temporaries MB": "{temporaries_mb}",
      "compiled in s": "{seconds}",
    },
  ),
  "gathered_weights": Table(
    "gathered_weights",
    {
      "program": "{backbone}, {stage}, `{program}`",
      "traffic TB, partial products": "{traffic_tb_of_partial_products}",
      "gathered": "{traffic_tb_gathered}",
      "MFU at most, partial products": "{mfu_bound_of_partial_products:.0%}",
      "gathered ": "{mfu_bound_gathered:.0%}",
    },
  ),
  "convolution_blocks": Table(
    "convolution_blocks",
    {
      "part": "{part}",
      "input": "{input}",
      "s": "{seconds}",
      "of processors": "{processor_seconds}",
      "traffic GB": "{traffic_gb:.2f}",
      "Mcycles": "{mcycles:.2f}",
    },
    few_rows,
  ),
  "convolution_choices": Table(
    "convolution_choices",
    {
      "convolutions in blocks": "{blocks}",
      "processor s, decoder forwards": "{processor_seconds}",
      "Mcycles": "{mcycles}",
    },
  ),
  "heads_by_tiles": Table(
    "heads_by_tiles",
    {
      "heads": "{heads}",
      "code MB": "{code_mb}",
      "temporaries GiB": "{temporaries_gib:.2f}",
      "traffic TB": "{traffic_tb:.3f}",
      "Gcycles": "{gcycles:.3f}",
      "of copies": "{gcycles_of_copies:.3f}",
    },
  ),
  "steps": Table(
    "steps",
    {
      "update": "`{update}`",
      "program": "{program}",
      "GFLOP": "{gflop:.1f}",
      "CPU s": "{cpu_seconds:.3f}",
      "wall s": "{wall_seconds:.3f}",
      "times ours": "{times_ours:.2f}",
      "MFU": "{mfu:.0%}",
      "loss": "{loss:.6f}",
    },
  ),
  "loop_share": Table(
    "loop_share",
    {
      "config": "`{config}`",
      "s": "{seconds:.1f}",
      "outside of programs": "{share:.2%}",
      "longest gap": "{longest}",
    },
    lambda rows: [
      row | {"longest": "{between}, {share:.2%}".format(**row["gaps"][0])} if row["gaps"] else row
      for row in rows
    ],
  ),
  "programs": Table(
    "programs",
    {
      "config": "`{config}`",
      "attention": "{attention}",
      "devices": "{devices}",
      "program": "`{program}`",
      "first s": "{first:digits}",
      "s": "{seconds:digits}",
      "TFLOP/s": "{tflops:digits}",
      "MFU": "{mfu:.0%}",
      "peak GB": "{peak_gb:.1f}",
    },
  ),
  "simulated_devices": Table(
    "programs",
    {
      "program": "`{program}`",
      "devices": "{devices}",
      "first s": "{first:digits}",
      "s": "{seconds:digits}",
    },
  ),
  "gaussian": Table(
    "tilt_gaussian",
    {
      "method": "{method}",
      "training": "{training}",
      "beta": "{beta}",
      "seed": "{seed}",
      "shift error": "{shift_error:.1%}",
      "covariance error": "{covariance_error:.1%}",
    },
    shifts,
  ),
  "cold_starts": Table(
    "tilt_mixture",
    {
      "fake-score updates": "{fake_updates}",
      "generator updates": "{updates:,}",
      "level 0.9": "{at_0_9:.4f}",
      "0.75": "{at_0_75:.4f}",
      "0.5": "{at_0_5:.4f}",
      "0": "{at_0:.4f}",
      "over the floor": "{over_floor:.1f}",
    },
    cold_starts,
  ),
  "even_levels": Table(
    "tilt_even",
    {
      "levels": "0.75, 0.5, 0.25, 0",
      "units": "{width}",
      "generator updates": "{updates:,}",
      "over the floor, five sets of samples": "{sets}",
    },
    lambda rows: [
      row | {"sets": ", ".join(f"{x:.2f}" for x in sorted(row["over_floor_of_sets"]))}
      for row in rows
    ],
  ),
  "tilted_mixture": Table("tilt_mixture", _TILT, tilts),
  "estimators": Table(
    "tilt_estimators",
    {
      "quantity": "{quantity}",
      "reference": "{reference}",
      "estimate": "{estimate}",
      "simpler estimate": "{simpler}",
    },
    estimates,
  ),
  "shared_noise": Table(
    "tilt_estimators",
    {
      "trained steps": "{trained}",
      "images a group": "{images}",
      "independent noise": "{independent:.2g}",
      "shared noise": "{shared:.2g}",
      "shared / independent": "{ratio:.2g}",
    },
    shared_noise,
  ),
  "policy_variance": Table(
    "policy_variance",
    {
      "trained steps": "{trained} of 3",
      "noise of the others": "{noise}",
      "rewards' deviation within a group": "{deviation:.3f}",
      "variance over GRPO's": "{variance:.2f} ± {variance_error:.2f}",
    },
    lambda rows: [{"variance_error": 0.0} | row for row in rows],
  ),
  "adapters_bfloat16": Table(
    "tilt_bfloat16",
    {
      "rate": "{rate:.0e}",
      "`a` changed": "{changed_a:.1%}",
      "`a` travelled": "{moved_a:.1%}",
      "`b` changed": "{changed_b:.1%}",
      "`b` travelled": "{moved_b:.1%}",
    },
    flattened,
  ),
  "ratio_bfloat16": Table(
    "tilt_estimators",
    {
      "type": "{dtype}",
      "step": "{step}",
      "largest drift": "{drift:.1g}",
      "outside the clip range": "{outside_clip:.0%}",
    },
    lambda rows: part("half_precision")(rows)[0]["rows"],
  ),
  "ablations_stage1": Table("ablations", _ABLATION, ablations("stage1")),
  "ablations_stage2": Table("ablations", _ABLATION, ablations("stage2")),
  "clean_stage1": Table("ablations_clean_teacher", _ABLATION, ablations("stage1")),
  "clean_stage2": Table("ablations_clean_teacher", _ABLATION, ablations("stage2")),
  "quick_run_variants": Table(
    "quick_run_variants",
    {
      "moving average": "{moving_average}",
      "deviation of `a`": "{deviation}",
      "seed": "{seed}",
      "CLIPScore": "{clipscore:.3f}",
      "against the first": "{clipscore_against:+.3f}",
      "GenEval, soft": "{geneval:.3f}",
      "against the first ": "{geneval_against:+.3f}",
    },
    against_first,
  ),
  "long_run": Table(
    "long_run",
    {
      "system": "{system}",
      "seed": "{seed}",
      "CLIPScore": _SCORES["CLIPScore"],
      "over teacher": "{clipscore_over_teacher:+.3f} ± {clipscore_over_teacher_error:.3f}",
      "GenEval, soft": _SCORES["GenEval, soft"],
      "over cold start": "{geneval_over_start:+.3f} ± {geneval_over_start_error:.3f}",
      "over teacher ": "{geneval_over_teacher:+.3f} ± {geneval_over_teacher_error:.3f}",
    },
  ),
  "mistakes": Table(
    "mistakes",
    {
      "system": "{system}",
      "right": "{right:.0%}",
      "washed out": "{washed_out:.0%}",
      "too few": "{too_few:.0%}",
      "too many": "{too_many:.0%}",
      "colour of another object": "{colour_of_another:.0%}",
      "other colour": "{other_colour:.0%}",
    },
  ),
  "teacher_chain": Table(
    "teacher_chain",
    {
      "teacher's updates on mixed images": "{updates}",
      "washed out of its objects": "{washed_out:.0%}",
      "teacher": "{teacher:.3f}",
      "after stage 1": "{stage1:.3f}",
      "after the quick run": "{quick_run:.3f}",
      "over cold start": "{over_start:+.3f}",
    },
  ),
  "tiny_again": Table(
    "tiny_again",
    {
      "system": "{system}",
      "CLIPScore, shipped": "{clipscore_shipped:.3f} ± {clipscore_shipped_error:.3f}",
      "second training": "{clipscore_again:.3f} ± {clipscore_again_error:.3f}",
      "GenEval, shipped": "{geneval_shipped:.3f} ± {geneval_shipped_error:.3f}",
      "second training ": "{geneval_again:.3f} ± {geneval_again_error:.3f}",
    },
  ),
  "load_memory": Table(
    "load_memory",
    {
      "bases": "{bases}",
      "stored GB": "{stored_gb}",
      "largest leaf GB": "{largest_leaf_gb:.2f}",
      "above the parameters GB": "{above_parameters_gb:.2f}",
      "over the largest leaf": "{ratio_to_largest_leaf:.2f}",
    },
  ),
  "prompt_memory": Table(
    "prompt_memory",
    {
      "family": "`{family}`",
      "MB a prompt": "{mb_per_prompt:.2f}",
      "prompts a batch": "{prompts}",
      "steps": "{steps:,}",
      "start GB": "{start_gb:.2f}",
      "highest": "{highest_gb:.2f}",
      "end": "{end_gb:.2f}",
      "growth": "{growth_gb:.2f}",
    },
  ),
  "checkpoint_cost": Table(
    "checkpoint_cost",
    {
      "stage": "{stage}",
      "state": "{state_mb:.1f} MB",
      "step": "{step_seconds:.2f} s",
      "save stands still": "{still_seconds:.2f} s",
      "longer": "{longer_seconds:.2f} s",
      "save_every": "{save_every}",
      "cost": "{cost:.2%}",
    },
  ),
  "bad_input": Table(
    "bad_input",
    {
      "input": "{input}",
      "generated": "{generated:,}",
      "refused in a sentence": "{refused:,}",
      "harmless, accepted": "{accepted:,}",
      "anything else": "{defects:,}",
    },
  ),
  "kills": Table(
    "kills",
    {
      "seed": "{seed}",
      "stage": "{stage}",
      "kills": "{kills}",
      "before the first checkpoint": "{early}",
      "between saves": "{between}",
      "during a save": "{saving}",
      "runs to the end": "{laps}",
      "leaves compared": "{leaves}",
      "failures": "{failures}",
    },
  ),
  "rewards": Table(
    "rewards",
    {
      "reward": "`{reward}`",
      "images a second": "{device:.1f}",
      "torch": "{torch:.1f}",
      "ratio": "{speedup:.2f}",
      "largest difference of scores": "{largest_difference:.1e}",
    },
  ),
}
