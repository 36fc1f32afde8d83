"""The tables of the pages: from which result, with which columns and rows."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from benchmarks import selections
from benchmarks.selections import Rows


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
    "quick_run",
    {"system": "{system}", "CLIPScore": "{clip}", "GenEval, soft": "{gen}"},
    selections.signed,
  ),
  "memory_and_peaks": Table(
    "memory_by_mesh",
    {
      "backbone": "{name}", "configs": "`{family}_stage1.py`, `{family}_stage2.py`",
      "1 device": "{devices_1:.1f}", "8 devices": "{devices_8:.1f}",
      "64 devices": "{devices_64:.1f}",
      "peaks of stage 1, stage 2 in GiB on 8 TPU chips": "{peaks_8}",
      "on 64 TPU chips": "{peaks_64}",
    },
    selections.memory_and_peaks,
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
      "backbone": "{backbone}", "stage": "{stage}", "slice": "{slice}",
      "highest peak GiB of HBM": "{peak_gib:.2f} of {limit_gib:.2f}, `{largest}`",
      "each program takes at least s": "{bounds}", "lowest MFU bound": "{slowest}",
      "compiled in s": "{compiled}",
    },
    selections.programs_by_slice,
  ),
  "hardware_bounds": Table(
    "hardware_bounds",
    {
      "program": "`{program}`", "slice": "{slice}", "TFLOP a device": "{tflop:digits}",
      "traffic TB": "{traffic_tb:digits}", "sent GB": "{sent_gb:digits}",
      "peak GiB of HBM, no code": "{peak_gib:.2f} of {limit_gib:.2f}",
      "bound s": "{bound_s:digits}", "by": "{bound_by}", "MFU at most": "{mfu_bound:.0%}",
    },
  ),
  "gpu_fit": Table(
    "gpu_bounds",
    {
      "backbone": "{backbone}", "stage": "{stage}", "GPUs": "{slice}",
      "highest peak GB": "{peak_gb:.1f} of {limit_gb:.1f}, `{largest}`",
      "each program takes at least s": "{bounds}", "launches": "{launches}",
    },
    selections.programs_by_gpus,
  ),
  "gpu_bounds": Table(
    "gpu_bounds",
    {
      "program": "`{program}`", "GPUs": "{slice}", "setting": "{setting}",
      "TFLOP a device": "{tflop:digits}", "traffic TB": "{traffic_tb:digits}",
      "sent GB": "{sent_gb:digits}", "launches": "{launches:,}",
      "peak GiB": "{peak_gib:.2f} of {limit_gib:.2f}", "bound s": "{bound_s:digits}",
      "by": "{bound_by}", "MFU at most": "{mfu_bound:.0%}",
    },
  ),
  "no_recomputation": Table(
    "no_recomputation",
    {
      "program": "`{program}`", "batch": "{batch}", "TFLOP a device": "{tflop:,.1f}",
      "temporaries asked for, GiB": "{temporaries_gib:.2f}", "available, GiB": "{limit_gib:.2f}",
    },
  ),
  "attention_memory": Table(
    "attention_memory",
    {
      "kernel": "{kernel}", "tokens x width of a head": "{tokens_and_width}",
      "temporaries MB": "{temporaries_mb}", "compiled in s": "{seconds}",
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
      "part": "{part}", "input": "{input}", "s": "{seconds}",
      "of processors": "{processor_seconds}", "traffic GB": "{traffic_gb:.2f}",
      "Mcycles": "{mcycles:.2f}",
    },
    selections.few_rows,
  ),
  "convolution_choices": Table(
    "convolution_choices",
    {
      "convolutions in blocks": "{blocks}", "processor s, decoder forwards": "{processor_seconds}",
      "Mcycles": "{mcycles}",
    },
  ),
  "heads_by_tiles": Table(
    "heads_by_tiles",
    {
      "heads": "{heads}", "code MB": "{code_mb}", "temporaries GiB": "{temporaries_gib:.2f}",
      "traffic TB": "{traffic_tb:.3f}", "Gcycles": "{gcycles:.3f}",
      "of copies": "{gcycles_of_copies:.3f}",
    },
  ),
  "steps": Table(
    "steps",
    {
      "update": "`{update}`", "program": "{program}", "GFLOP": "{gflop:.1f}",
      "CPU s": "{cpu_seconds:.3f}", "wall s": "{wall_seconds:.3f}",
      "times ours": "{times_ours:.2f}", "MFU": "{mfu:.0%}", "loss": "{loss:.6f}",
    },
  ),
  "loop_share": Table(
    "loop_share",
    {
      "config": "`{config}`", "s": "{seconds:.1f}", "outside of programs": "{share:.2%}",
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
      "config": "`{config}`", "attention": "{attention}", "devices": "{devices}",
      "program": "`{program}`", "first s": "{first:digits}", "s": "{seconds:digits}",
      "TFLOP/s": "{tflops:digits}", "MFU": "{mfu:.0%}", "peak GB": "{peak_gb:.1f}",
    },
  ),
  "simulated_devices": Table(
    "programs",
    {
      "program": "`{program}`", "devices": "{devices}", "first s": "{first:digits}",
      "s": "{seconds:digits}",
    },
  ),
  "gaussian": Table(
    "tilt_gaussian",
    {
      "method": "{method}", "training": "{training}", "beta": "{beta}", "seed": "{seed}",
      "shift error": "{shift_error:.1%}", "covariance error": "{covariance_error:.1%}",
    },
    selections.shifts,
  ),
  "cold_starts": Table(
    "tilt_mixture",
    {
      "fake-score updates": "{fake_updates}", "generator updates": "{updates:,}",
      "level 0.9": "{at_0_9:.4f}", "0.75": "{at_0_75:.4f}", "0.5": "{at_0_5:.4f}",
      "0": "{at_0:.4f}", "over the floor": "{over_floor:.1f}",
    },
    selections.cold_starts,
  ),
  "even_levels": Table(
    "tilt_even",
    {
      "levels": "0.75, 0.5, 0.25, 0", "units": "{width}", "generator updates": "{updates:,}",
      "over the floor, five sets of samples": "{sets}",
    },
    lambda rows: [
      row | {"sets": ", ".join(f"{x:.2f}" for x in sorted(row["over_floor_of_sets"]))}
      for row in rows
    ],
  ),
  "tilted_mixture": Table("tilt_mixture", _TILT, selections.tilts),
  "estimators": Table(
    "tilt_estimators",
    {
      "quantity": "{quantity}", "reference": "{reference}", "estimate": "{estimate}",
      "simpler estimate": "{simpler}",
    },
    selections.estimates,
  ),
  "shared_noise": Table(
    "tilt_estimators",
    {
      "trained steps": "{trained}", "images a group": "{images}",
      "independent noise": "{independent:.2g}", "shared noise": "{shared:.2g}",
      "shared / independent": "{ratio:.2g}",
    },
    selections.shared_noise,
  ),
  "policy_variance": Table(
    "policy_variance",
    {
      "trained steps": "{trained} of 3", "noise of the others": "{noise}",
      "rewards' deviation within a group": "{deviation:.3f}",
      "variance over GRPO's": "{variance:.2f} ± {variance_error:.2f}",
    },
    lambda rows: [{"variance_error": 0.0} | row for row in rows],
  ),
  "adapters_bfloat16": Table(
    "tilt_bfloat16",
    {
      "rate": "{rate:.0e}", "`a` changed": "{changed_a:.1%}", "`a` travelled": "{moved_a:.1%}",
      "`b` changed": "{changed_b:.1%}", "`b` travelled": "{moved_b:.1%}",
    },
    selections.flattened,
  ),
  "ratio_bfloat16": Table(
    "tilt_estimators",
    {
      "type": "{dtype}", "step": "{step}", "largest drift": "{drift:.1g}",
      "outside the clip range": "{outside_clip:.0%}",
    },
    lambda rows: selections.part("half_precision")(rows)[0]["rows"],
  ),
  "ablations_stage1": Table("ablations", _ABLATION, selections.ablations("stage1")),
  "ablations_stage2": Table("ablations", _ABLATION, selections.ablations("stage2")),
  "clean_stage1": Table("ablations_clean_teacher", _ABLATION, selections.ablations("stage1")),
  "clean_stage2": Table("ablations_clean_teacher", _ABLATION, selections.ablations("stage2")),
  "quick_run_variants": Table(
    "quick_run_variants",
    {
      "moving average": "{moving_average}", "deviation of `a`": "{deviation}", "seed": "{seed}",
      "CLIPScore": "{clipscore:.3f}", "against the first": "{clipscore_against:+.3f}",
      "GenEval, soft": "{geneval:.3f}", "against the first ": "{geneval_against:+.3f}",
    },
    selections.against_first,
  ),
  "long_run": Table(
    "long_run",
    {
      "system": "{system}", "seed": "{seed}",
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
      "system": "{system}", "right": "{right:.0%}", "washed out": "{washed_out:.0%}",
      "too few": "{too_few:.0%}", "too many": "{too_many:.0%}",
      "colour of another object": "{colour_of_another:.0%}", "other colour": "{other_colour:.0%}",
    },
  ),
  "teacher_chain": Table(
    "teacher_chain",
    {
      "teacher's updates on mixed images": "{updates}",
      "washed out of its objects": "{washed_out:.0%}", "teacher": "{teacher:.3f}",
      "after stage 1": "{stage1:.3f}", "after the quick run": "{quick_run:.3f}",
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
      "bases": "{bases}", "stored GB": "{stored_gb}", "largest leaf GB": "{largest_leaf_gb:.2f}",
      "above the parameters GB": "{above_parameters_gb:.2f}",
      "over the largest leaf": "{ratio_to_largest_leaf:.2f}",
    },
  ),
  "prompt_memory": Table(
    "prompt_memory",
    {
      "family": "`{family}`", "MB a prompt": "{mb_per_prompt:.2f}", "prompts a batch": "{prompts}",
      "steps": "{steps:,}", "start GB": "{start_gb:.2f}", "highest": "{highest_gb:.2f}",
      "end": "{end_gb:.2f}", "growth": "{growth_gb:.2f}",
    },
  ),
  "checkpoint_cost": Table(
    "checkpoint_cost",
    {
      "stage": "{stage}", "state": "{state_mb:.1f} MB", "step": "{step_seconds:.2f} s",
      "save stands still": "{still_seconds:.2f} s", "longer": "{longer_seconds:.2f} s",
      "save_every": "{save_every}", "cost": "{cost:.2%}",
    },
  ),
  "bad_input": Table(
    "bad_input",
    {
      "input": "{input}", "generated": "{generated:,}", "refused in a sentence": "{refused:,}",
      "harmless, accepted": "{accepted:,}", "anything else": "{defects:,}",
    },
  ),
  "kills": Table(
    "kills",
    {
      "seed": "{seed}", "stage": "{stage}", "kills": "{kills}",
      "before the first checkpoint": "{early}", "between saves": "{between}",
      "during a save": "{saving}", "runs to the end": "{laps}", "leaves compared": "{leaves}",
      "failures": "{failures}",
    },
  ),
  "rewards": Table(
    "rewards",
    {
      "reward": "`{reward}`", "images a second": "{device:.1f}", "torch": "{torch:.1f}",
      "ratio": "{speedup:.2f}", "largest difference of scores": "{largest_difference:.1e}",
    },
  ),
}  # fmt: skip
