"""Exports adapters for other programs.

python -m rtdmd_jax.export --pipeline DIR --lora PATH[:SCALE] --format peft|comfyui|merged --out DIR
python -m rtdmd_jax.export --checkpoint WORKDIR[:STEP] --format peft|comfyui|merged --out DIR

Several --lora are added up in order. `peft` is a directory for PEFT and for diffusers'
load_lora_weights, `comfyui` one file with the names that ComfyUI knows, `merged` a diffusers
transformer directory whose weights have the adapters in them. Reads the config of the pipeline's
transformer (for `merged` its weights too) and the adapters, those of a run's --checkpoint with the
earlier stage's. Writes --out, where a README.md says how to load it; for an adapter of a run it has
the run's settings and scores as well.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from rtdmd_jax import cli
from rtdmd_jax.adapters.comfyui import save_comfyui
from rtdmd_jax.adapters.load import Lora, load_adapters
from rtdmd_jax.adapters.lora import equal_ranks, fold_scale, merge, stack_adapters
from rtdmd_jax.adapters.peft import adapter_layers, read_notes, save_peft
from rtdmd_jax.errors import UserError
from rtdmd_jax.models import Transformer, build_transformer
from rtdmd_jax.report.model_card import Run, find_run, read_scores, write_card
from rtdmd_jax.runtime.multihost import is_main
from rtdmd_jax.runtime.sharding import to_numpy
from rtdmd_jax.training.setup import Setup
from rtdmd_jax.training.state import TrainState
from rtdmd_jax.training.stored_run import (
  FLAG_HELP,
  IN_TRAINING,
  ROLES,
  StoredRun,
  generator_weights,
)
from rtdmd_jax.weights.hub import local_path
from rtdmd_jax.weights.safetensors import checkpoint_dtype, load_params, read_config
from rtdmd_jax.weights.shards import SHARD_BYTES, save_sharded

Tree = Any
FORMATS = ("peft", "comfyui", "merged")
COMFYUI_NAME = "comfyui_lora.safetensors"


def export_adapters(config: Any, setup: Setup, state: TrainState, directory: Path) -> None:
  """Writes `generator/` (see `generator_weights`) and `fake_score/`, earlier stages included.

  Each file takes the place of an earlier one in one step, and its header says after which step the
  weights were taken and which they are. The generator gets a model card with the scores of
  `evaluation.json` above the directory, if they are of this step. All processes of a run call this,
  and one writes.
  """
  table, step = setup.pipeline.transformer.table, int(state.step)
  generator, words = generator_weights(state.ema, state.generator, config.ema)
  for name, frozen, trained, which in (
    ("generator", setup.frozen.generator, generator, words),
    ("fake_score", setup.frozen.fake_score, state.fake_score, IN_TRAINING),
  ):
    trained = jax.tree.map(lambda a: a.astype(jnp.float32), trained)
    adapters, rank = equal_ranks(stack_adapters(frozen, fold_scale(trained, config.lora.alpha)))
    adapters = to_numpy(adapters)
    if not is_main():
      continue
    # Full names: in FLUX.2 the suffix `attn.to_out` also names a list of two modules in the double
    # blocks, which PEFT refuses; and an earlier stage may have adapted more layers.
    targets = sorted(adapter_layers(adapters, table))
    notes = {"step": str(step), "weights": which}
    # The scale is in b, so alpha equals the rank.
    save_peft(
      directory / name, adapters, table, rank=rank, alpha=float(rank), targets=targets, notes=notes
    )
  if is_main():
    write_run_card(config, setup, directory, read_scores(directory.parent, step))
    print(f"export: {directory} holds step {step:,}, generator: {words}")


def write_run_card(config: Any, setup: Setup, directory: Path, scores: Any) -> None:
  """Writes the model card of what `export_adapters` wrote into `directory`, and its scores."""
  notes, settings = read_notes(directory / "generator"), json.loads(config.to_json_best_effort())
  run = Run(settings, scores, int(notes["step"]), notes["weights"])
  base = config.model.generator_init or config.model.pretrained
  write_card(directory / "generator", "peft", setup.pipeline.transformer, base, run)


def export_merged(
  source: Path,
  transformer: Transformer,
  adapters: Tree,
  out: Path,
  *,
  dtype: Any = None,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes a diffusers transformer directory with `kernel + a b` in place of each kernel.

  Args:
    source: the base's transformer directory.
    transformer: its network.
    adapters: adapter tree with the scale folded in.
    out: directory to write.
    dtype: of the weights; the base's own by default.
    shard_bytes: the most a file holds.
  """
  own = checkpoint_dtype(source) if dtype is None else dtype
  params = load_params(source, transformer.init_abstract(), transformer.table, dtype=own)
  ranked, rank = equal_ranks(adapters)
  merged = merge(params, ranked, float(rank))
  config = read_config(source)
  save_sharded(out, config, merged, transformer.table, shard_bytes=shard_bytes)


def main(call: cli.Invocation) -> None:
  """Exports as the flags say."""
  values = call.flags
  if values.format not in FORMATS:
    raise UserError(f"--format={values.format} is unknown; choose one of {', '.join(FORMATS)}.")
  if values.dtype is not None and values.format != "merged":
    raise UserError("--dtype applies to --format=merged only; adapters are written as float32.")
  if bool(values.lora) == bool(values.checkpoint):
    raise UserError(
      "--lora is required, a LoRA file or directory, PATH or PATH:SCALE, or in its place"
      " --checkpoint, WORKDIR or WORKDIR:STEP."
    )
  role = values.role or "generator"
  if role not in ROLES or (values.role and not values.checkpoint):
    raise UserError(f"--role={role} must be one of {', '.join(ROLES)}, and goes with --checkpoint.")
  stored = StoredRun.parse(values.checkpoint) if values.checkpoint else None
  pipeline = values.pipeline or (stored and stored.base(role))
  if not pipeline:
    raise UserError("--pipeline is required with --lora: a pipeline or transformer directory.")
  out = Path(values.out)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f"--out={out} exists and is not an empty directory; choose another.")
  dtype = _dtype(values.dtype)
  kind = "transformer" if values.format == "merged" else "network"
  source = _transformer_directory(local_path(pipeline, kind))
  if source.is_file():
    raise UserError(
      f"the adapters belong to the single file {source}; give --pipeline=DIR, a directory of the"
      " same network with its config.json."
    )
  transformer = build_transformer(read_config(source))
  if stored is None:
    adapters, notes = load_adapters([Lora.parse(value) for value in values.lora], transformer), None
    runs = [run for run in (find_run(Lora.parse(value).path) for value in values.lora) if run]
    run = runs[-1] if runs else None
  else:
    adapters, words = stored.adapters(transformer, role)
    run = Run(stored.config, read_scores(stored.workdir, stored.step), stored.step, words)
    notes = {"step": str(stored.step), "weights": words}
  cli.make_folder(out, "--out")
  if values.format == "merged":
    export_merged(source, transformer, adapters, out, dtype=dtype)
  elif values.format == "comfyui":
    save_comfyui(out / COMFYUI_NAME, adapters, transformer)
  else:
    adapters, rank = equal_ranks(adapters)
    targets = sorted(adapter_layers(adapters, transformer.table))
    table = transformer.table
    save_peft(out, adapters, table, rank=rank, alpha=float(rank), targets=targets, notes=notes)
  if role == "generator":
    write_card(out, values.format, transformer, pipeline, run)
  print(json.dumps({"out": str(out), "files": sorted(p.name for p in out.iterdir())}))


def _transformer_directory(path: Path) -> Path:
  """The transformer of a pipeline directory, or the directory itself."""
  inner = path / "transformer"
  return inner if inner.is_dir() else path


def _dtype(name: str | None) -> Any:
  known = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
  if name is not None and name not in known:
    raise UserError(f"--dtype={name} is unknown; choose one of {', '.join(known)}.")
  return known.get(name)


def define_flags(values: flags.FlagValues) -> None:
  """The tool's own flags."""
  text, several = flags.DEFINE_string, flags.DEFINE_multi_string
  about = "A diffusers pipeline or transformer, PATH or org/name; the run's with --checkpoint."
  text("pipeline", None, about, flag_values=values)
  several("lora", [], "A LoRA: PATH or PATH:SCALE; may be repeated.", flag_values=values)
  text("checkpoint", None, f"In place of --lora: {FLAG_HELP}", flag_values=values)
  about = f"Whose adapters of the checkpoint: {' (default) or '.join(ROLES)}."
  text("role", None, about, flag_values=values)
  text("format", None, f"What to write: {', '.join(FORMATS)}.", flag_values=values)
  text("out", None, "Directory to write; must not exist or be empty.", flag_values=values)
  text("dtype", None, "Type of merged weights; the base's own by default.", flag_values=values)


if __name__ == "__main__":
  required = ("format", "out")
  sys.exit(cli.run(main, define_flags=define_flags, requires=required, shared=()))
