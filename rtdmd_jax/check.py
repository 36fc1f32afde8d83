"""What is wrong with a run, found out before it starts: nothing is loaded, trained or written."""

import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rtdmd_jax import sharding, train
from rtdmd_jax.aot.abstract import abstract_batch, abstract_setup
from rtdmd_jax.aot.compile import program_arguments
from rtdmd_jax.aot.published import PUBLISHED
from rtdmd_jax.build import Setup, micro_batches, optimizer_config, policy_config
from rtdmd_jax.config import flatten
from rtdmd_jax.errors import UserError
from rtdmd_jax.limits import check_limits
from rtdmd_jax.models import build_transformer
from rtdmd_jax.models.text import load_tokenizer
from rtdmd_jax.optim import make_optimizer
from rtdmd_jax.prompts import load_prompts
from rtdmd_jax.resume import check_resume, read_stored_config
from rtdmd_jax.rewards import device, multi
from rtdmd_jax.rewards.imports import imported
from rtdmd_jax.wandb_log import import_wandb
from rtdmd_jax.weights.adapters import Lora
from rtdmd_jax.weights.safetensors import check_params, checkpoint_keys, read_config

_ROLES = ("generator", "fake_score", "teacher")
# Options of rewards that name files or directories.
_PATHS = ("directory", "weights", "tokenizer", "processor", "clip", "questions")
# Rewards whose encoder's weights are safetensors in `directory`.
_ENCODERS = ("clipscore", "pickscore", "aesthetic")
# A service is asked once, and shortly.
_ASK = {"attempts": 1, "timeout": 5.0}


class Report(NamedTuple):
  """Lines of text: what would run, and a sentence for everything that is wrong."""

  lines: list[str]
  problems: list[str]


def check(config: Any, workdir: Path | None = None, *, allow_config_change: bool = False) -> Report:
  """Builds a run of `config` abstractly and lists all problems, not the first alone.

  Of checkpoints only config files and the headers of safetensors files are read; programs are
  traced, not compiled. Reward services are asked whether they have the reward; rewards that are
  PyTorch models on this machine are judged by their options and files.

  Args:
    config: of any stage.
    workdir: of the run, if it is known already.
    allow_config_change: as in `train.train`.
  """
  problems: list[str] = []
  lines = [f"{key} = {value!r}" for key, value in flatten(config.to_dict())]
  if workdir is not None:
    lines += _try(problems, _workdir, config, workdir, allow_config_change) or []
  if config.get("stage") == "pretrain":
    return Report([*lines, "would run: pretrain, every phase without output"], problems)
  if config.get("stage") not in train.STAGES:
    stages = ", ".join(train.STAGES)
    problems.append(f"stage is {config.get('stage')!r}; use one of {stages} or pretrain.")
    return Report(lines, problems)
  before = len(problems)
  _try(problems, check_limits, config)
  if len(problems) > before:  # what follows takes such values for granted
    return Report(lines, problems)
  if config.log.wandb:
    _try(problems, import_wandb)
  lines += _try(problems, _prompts, config) or []
  usable = config.copy_and_resolve_references().unlock()
  for name, options in config.rewards.items():
    before = len(problems)
    _try(problems, _reward, name, dict(options))
    if len(problems) > before:
      del usable.rewards[name]
  for name, options in config.eval.rewards.items():
    _try(problems, _reward, name, {"weight": 1.0, **options})
  _earlier_stages(problems, config)
  described = _pipeline(problems, config)
  mesh = _try(problems, lambda: sharding.make_mesh(**config.mesh))
  setup = _try(problems, abstract_setup, usable) if described else None
  if setup is not None and mesh is not None:
    with jax.set_mesh(mesh):
      lines += _programs(problems, usable, setup)
  return Report([*lines, *_plan(config)], problems)


def _try(problems: list[str], part: Callable, *args: Any) -> Any:
  """The result of `part`; its mistake joins `problems` (once) and the result is None then."""
  try:
    return part(*args)
  except UserError as error:
    sentence = " ".join(str(error).split())
    if sentence not in problems:
      problems.append(sentence)
    return None


def _workdir(config: Any, workdir: Path, allow: bool) -> list[str]:
  there = next(p for p in (workdir, *workdir.absolute().parents) if p.exists())
  if not there.is_dir() or not os.access(there, os.W_OK):
    raise UserError(f"--workdir is {workdir}, but {there} is no directory that can be written to.")
  saved = [int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit()]
  if not saved:
    return [f"workdir {workdir}: a new run"]
  name, settings = f"{workdir / 'checkpoints'}/{max(saved)}", config.to_json_best_effort()
  stored = read_stored_config(workdir / "config.json")
  changed = check_resume(name, stored, json.loads(settings), train.FIXED, allow=allow)
  return [
    f"workdir {workdir}: goes on after step {max(saved)}",
    *(f"  changed: {c}" for c in changed),
  ]


def _prompts(config: Any) -> list[str]:
  prompts = load_prompts(config.data.prompts, split="train", metadata=True)
  held_out = load_prompts(config.data.held_out, split="test", metadata=True)
  if len(prompts) < config.batch.prompts:
    raise UserError(
      f"batch.prompts is {config.batch.prompts}, but {config.data.prompts} has {len(prompts)}"
      " prompts; lower it."
    )
  return [f"prompts: {len(prompts):,} to train on, {len(held_out):,} held out"]


def _reward(name: str, options: dict[str, Any]) -> None:
  """Whether a reward could be built, without its weights."""
  weight, gradient = options.pop("weight"), options.pop("backpropagate", False)
  if gradient and name not in device.NAMES:
    raise UserError(
      f"rewards.{name}.backpropagate is true, but only {', '.join(device.NAMES)} have gradients."
    )
  for key in _PATHS:
    if isinstance(options.get(key), str) and not Path(options[key]).exists():
      raise UserError(f"rewards.{name}.{key} is {options[key]}, which does not exist.")
  if name in device.NAMES:
    device.bind(name, options)
    if name in _ENCODERS:
      checkpoint_keys(options["directory"])
  elif ":" in name:
    options.pop("max_failed", None)
    try:
      inspect.signature(imported(name)).bind(**options)
    except TypeError as error:
      raise UserError(f"rewards.{name}: {error} in its options {options!r}.") from error
  elif "directory" not in options:
    asked = options | (_ASK if "url" in options or "openai_url" in options else {})
    multi.make({name: weight}, options={name: asked})


def _earlier_stages(problems: list[str], config: Any) -> None:
  for role in ("generator", "fake_score"):
    path = config.load[role]
    if path and not Lora.parse(path).path.exists():
      problems.append(f"load.{role} is {path}, which does not exist; run the earlier stage first.")


def _pipeline(problems: list[str], config: Any) -> bool:
  """The files of the pipeline and of each role; whether the networks' shapes are known."""
  before, directory = len(problems), Path(config.model.pretrained)
  for role in _ROLES:
    path = config.model[f"{role}_init"]
    if path and not Path(path).exists():
      problems.append(f"model.{role}_init is {path}, which does not exist.")
  if not directory.is_dir():
    problems.append(f"model.pretrained is {directory}, which is no directory.")
    return directory.name in PUBLISHED
  parts = _try(problems, read_config, directory, "model_index.json") or {}
  for name, made_by in sorted(parts.items()):
    if not isinstance(made_by, list) or None in made_by:
      continue
    if name == "vae" or name.startswith("text_encoder"):
      _try(problems, checkpoint_keys, directory / name)
    elif name.startswith("tokenizer"):
      _try(problems, load_tokenizer, directory / name)
  _try(problems, _transformers, config, directory)
  return len(problems) == before


def _transformers(config: Any, directory: Path) -> None:
  """Keys and shapes of every role's transformer."""
  transformer = build_transformer(read_config(directory / "transformer"))
  own = [config.model[f"{role}_init"] for role in _ROLES]
  for path in {directory, *(Path(value) for value in own if value and Path(value).exists())}:
    path = path / "transformer" if (path / "transformer").is_dir() else path
    check_params(path, transformer.init_abstract(), transformer.table)


def _programs(problems: list[str], config: Any, setup: Setup) -> list[str]:
  """Traces the programs on the current mesh; what they keep on every device."""
  _try(problems, _divides, config, setup)
  _try(problems, policy_config if config.stage == "stage2" else micro_batches, config)
  optimizers = train.Optimizers(
    *(make_optimizer(optimizer_config(c)) for c in (config.generator, config.fake_score))
  )
  state = _try(problems, jax.eval_shape, lambda: train.initial_state(config, setup, optimizers))
  if state is None:
    return []
  if not problems:
    _try(problems, _trace, config, setup, optimizers, state)
  lines, total = _memory(config, setup, state)
  limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
  if limit is not None and total > limit:
    problems.append(
      f"{total / 1e9:.2f} GB must stay on every device, which has {limit / 1e9:.2f} GB; use more"
      " devices along mesh.fsdp."
    )
  return lines


def _divides(config: Any, setup: Setup) -> None:
  mesh = sharding.current()
  count, parts = config.batch.prompts * config.batch.repeats, sharding.batch_parts()
  if count % parts:
    raise UserError(
      f"the batch has {count} images (batch.prompts x batch.repeats), which do not split over the"
      f" {parts} devices of mesh.data x mesh.fsdp; make it a multiple of {parts}."
    )
  heads = setup.pipeline.transformer.config.num_attention_heads
  if heads % mesh.shape["tensor"]:
    raise UserError(
      f"mesh.tensor is {mesh.shape['tensor']}, which does not divide the transformer's {heads}"
      " attention heads."
    )


def _trace(config: Any, setup: Setup, optimizers: Any, state: Any) -> None:
  """Runs the programs on shapes, where values that do not fit together meet."""
  known = {"state": state, "frozen": setup.frozen, "batch": abstract_batch(config, setup)}
  for name, program in train.PROGRAMS[config.stage](config, setup, optimizers).items():
    args = [known[key] for key in program_arguments(config.stage, name)]
    try:
      result = jax.eval_shape(program, *args)
    except ValueError as error:
      raise UserError(
        f"the program {name} cannot be made of this configuration: {error}"
      ) from error
    if name == "rollout":
      score = jax.ShapeDtypeStruct((config.batch.prompts * config.batch.repeats,), jnp.float32)
      known |= {"samples": result, "rewards": dict.fromkeys(config.rewards, score)}


def _memory(config: Any, setup: Setup, state: Any) -> tuple[list[str], int]:
  """What stays on every device during a run, and the bytes of it in all."""
  frozen, mesh = setup.frozen, sharding.current()
  bases, text = (
    sharding.placed(tree, mesh, offload=config.model.offload)
    for tree in (frozen.bases, setup.pipeline.text.params)
  )
  trees: Mapping[str, Any] = {
    **{f"base {Path(name).name}": base for name, base in bases.items()},
    **{f"reward {name}": params for name, params in frozen.rewards.items()},
    "autoencoder": frozen.vae,
    "text encoders": text,
    "earlier adapters": (frozen.generator, frozen.fake_score),
    "adapters": (state.generator, state.fake_score),
    "moving average": state.ema,
    "optimizers": (state.generator_opt, state.fake_score_opt),
  }
  rows = sharding.table(trees, mesh)
  total = sum(local for *_, local in rows)
  parts = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  lines = [f"mesh: {parts}", f"{'on every device':28s}{'values in all':>18s}{'GB':>10s}"]
  lines += [f"  {name:26s}{count:18,}{local / 1e9:10.3f}" for name, count, _, local in rows]
  lines.append(f"  {'sum':44s}{total / 1e9:10.3f}")
  return [*lines, "  activations come on top; rtdmd_jax.aot measures them for a TPU"], total


def _plan(config: Any) -> list[str]:
  """What the run would do, step by step."""
  t, images = config.train, config.batch.prompts * config.batch.repeats
  weights = ", ".join(f"{name} x {reward.weight:g}" for name, reward in config.rewards.items())
  lines = [f"would run: {config.stage}, {t.steps:,} steps of {images:,} images"]
  if config.stage == "stage1":
    lines.append(f"  each: a fake-score update; every {t.fake_update_ratio}th: a generator update")
  else:
    lines.append(f"  each: rollout, fake-score update, policy update; rewards {weights}")
  lines.append(
    f"  checkpoint every {t.save_every:,}, scores of held-out prompts every {config.eval.every:,}"
  )
  count = f"{config.eval.final_prompts:,} held-out prompts x {config.eval.final_images:,}"
  return [*lines, f"  at the end: {count}, export, report"]
