"""The README.md of an exported adapter: what it changes, how it scored, how to load it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rtdmd_jax.adapters.peft import read_notes
from rtdmd_jax.config import with_current_names
from rtdmd_jax.models import Transformer
from rtdmd_jax.report.scores import overlap_sentences, score_text
from rtdmd_jax.runtime.files import replace_text
from rtdmd_jax.weights.hub import title

FILE_NAME = "README.md"


class Run(NamedTuple):
  """The facts about a training run that a card tells.

  Attributes:
    config: its configuration as nested dicts.
    evaluation: `evaluation.json` of these weights, if there is one.
    step: after which the weights were taken.
    weights: which ones they are, such as "moving average".
  """

  config: Mapping[str, Any]
  evaluation: Mapping[str, Any] | None
  step: int | None = None
  weights: str | None = None


def find_run(adapter: Path) -> Run | None:
  """The run whose workdir has `adapter` in `export/`; None for an adapter of another origin."""
  workdir = adapter.resolve().parent.parent
  if adapter.resolve().parent.name != "export" or not (workdir / "config.json").is_file():
    return None
  notes = read_notes(adapter)
  step = int(notes["step"]) if notes.get("step", "").isdecimal() else None
  config = with_current_names(json.loads((workdir / "config.json").read_text()))
  return Run(config, read_scores(workdir, step), step, notes.get("weights"))


def read_scores(workdir: Path, step: int | None = None) -> dict[str, Any] | None:
  """The final evaluation of a run; None without a whole one, or if it is of another step.

  Args:
    workdir: of the run.
    step: of the weights; None takes the evaluation of any.
  """
  try:
    table = json.loads((workdir / "evaluation.json").read_text())
  except (OSError, ValueError):  # its writer may have been killed
    return None
  if not isinstance(table, dict) or "systems" not in table:
    return None
  return table if step is None or table.get("run", {}).get("step") == step else None


def write_card(
  directory: Path, kind: str, transformer: Transformer, base: str, run: Run | None
) -> None:
  """Writes `README.md` beside an export.

  Args:
    directory: of the export, which exists.
    kind: "peft", "comfyui" or "merged".
    transformer: the network that is adapted.
    base: directory or repository of the base; only its name is told.
    run: where the adapter is from, if that is known.
  """
  pipeline, network = transformer.names.pipeline, transformer.names.transformer
  name = title(base)
  parts = [
    _front_matter(kind),
    f"# {'Merged transformer' if kind == 'merged' else 'LoRA'} for {name}",
    "Made with [rtdmd_jax](https://arxiv.org/abs/2605.26108): few-step distillation (AC-DMD)"
    " and reinforcement learning together with distillation (RTDMD).",
    *([] if run is None else _training(run)),
    "## Loading it",
    *_loading(kind, pipeline, network, name),
    "The license of the base applies.",
  ]
  replace_text(directory / FILE_NAME, "\n\n".join(parts) + "\n")


def _front_matter(kind: str) -> str:
  tags = ["text-to-image", "rtdmd", *([] if kind == "merged" else ["lora"])]
  return "\n".join(["---", "library_name: diffusers", "tags:", *(f"- {t}" for t in tags), "---"])


def _training(run: Run) -> list[str]:
  c = run.config
  few = [str(step) for step in c["dmd"]["timesteps"]]
  facts = {
    "stage": c["stage"],
    "training steps": _steps(run),
    **({} if run.weights is None else {"weights": run.weights}),
    "images a step": f"{c['batch']['prompts'] * c['batch']['images_per_prompt']:,}",
    "rank and alpha of this stage": f"{c['lora']['rank']}, {c['lora']['alpha']:g}",
    "image size": f"{c['model']['image_size']} px",
    "sampling": f"{len(few)} steps at {', '.join(few)} thousandths before the base's shift,"
    f" no guidance, eta {c['dmd']['eta']:g}",
  }
  if c["rewards"]:
    label = "rewards x weights" if c["stage"] == "stage2" else "scored by"
    weights = (f"{name} x {reward['weight']:g}" for name, reward in c["rewards"].items())
    facts[label] = ", ".join(weights if c["stage"] == "stage2" else c["rewards"])
  parts = ["## Training", _table(("", ""), list(facts.items()))]
  if run.evaluation is not None and any(s["scores"] for s in run.evaluation["systems"]):
    parts += ["## Held-out scores", *_scores(run.evaluation)]
  return parts


def _steps(run: Run) -> str:
  total = run.config["train"]["steps"]
  return f"{total:,}" if run.step in (None, total) else f"{run.step:,} of {total:,}"


def _scores(evaluation: Mapping[str, Any]) -> list[str]:
  systems = evaluation["systems"]
  names = list(systems[0]["scores"])
  rows = [
    (s["name"], str(s["steps"]), f"{s['guidance']:g}", *(score_text(s["scores"][n]) for n in names))
    for s in systems
  ]
  counts = sorted({score["n"] for s in systems for score in s["scores"].values()})
  span = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
  compared = overlap_sentences(evaluation.get("run", {}).get("overlap") or {})
  return [
    _table(("system", "steps", "guidance", *names), rows),
    f"Means over {span} prompts, with 95 % intervals. {compared}".strip(),
  ]


def _loading(kind: str, pipeline: str, network: str, base: str) -> list[str]:
  steps = (
    "The scores belong to rtdmd_jax's own stochastic sampler (`python -m rtdmd_jax.sample`). Other"
    " programs draw with 4 steps and guidance 1, and their samplers give other images."
  )
  if kind == "comfyui":
    text = (
      "Put the `.safetensors` file into ComfyUI's `models/loras`, load it with"
      f" *LoraLoaderModelOnly* on {base} at strength 1, and sample with 4 steps and cfg 1."
    )
    return [text, steps]
  if kind == "merged":
    code = (
      f"from diffusers import {pipeline}, {network}\n\n"
      f'transformer = {network}.from_pretrained("THIS_DIRECTORY")\n'
      f'pipe = {pipeline}.from_pretrained("{base}", transformer=transformer)'
    )
    return ["diffusers:", f"```python\n{code}\n```", steps]
  code = (
    f"from diffusers import {pipeline}\n\n"
    f'pipe = {pipeline}.from_pretrained("{base}")\n'
    'pipe.load_lora_weights("THIS_DIRECTORY")\n'
    'image = pipe("a photo of a red fox", num_inference_steps=4, guidance_scale=1.0).images[0]'
  )
  convert = (
    "python -m rtdmd_jax.export --pipeline=BASE --lora=THIS_DIRECTORY --format=comfyui --out=OUT"
  )
  return [
    "diffusers:",
    f"```python\n{code}\n```",
    "PEFT reads the same directory. For ComfyUI convert it first:",
    f"```bash\n{convert}\n```",
    steps,
  ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)
