"""The programs of a run, made of shapes alone: whether they can be, and what they would take."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp

from rtdmd_jax.aot.abstract import abstract_batch, abstract_reward, abstract_setup, frozen_trees
from rtdmd_jax.aot.check import hardware
from rtdmd_jax.aot.check.report import Report
from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards import device_rewards
from rtdmd_jax.runtime import sharding
from rtdmd_jax.runtime.flops import count_flops
from rtdmd_jax.runtime.throughput import loop_turns
from rtdmd_jax.training.batch import encoding_bytes
from rtdmd_jax.training.programs import compile_programs
from rtdmd_jax.training.setup import Setup
from rtdmd_jax.training.stages import initial_state, step_programs
from rtdmd_jax.training.state import Batch
from rtdmd_jax.training.typed_config import micro_batches, policy_config
from rtdmd_jax.weights.hub import base_name, find
from rtdmd_jax.weights.published import PUBLISHED
from rtdmd_jax.weights.reward_files import option_kind

# What a value that does not fit raises while a program is traced.
_UNFIT = (ValueError, TypeError, ArithmeticError, flax.errors.FlaxError)


def check_programs(report: Report, config: Any, unreadable: Sequence[str]) -> None:
  """Builds the programs of a run whose networks are known; adds lines on memory and time.

  Rewards and adapters whose files are missing are taken to be as published, or as this run's.

  Args:
    report: of the check.
    config: of a stage.
    unreadable: roles whose adapter of an earlier stage cannot be read.
  """
  usable = _described(config, unreadable)
  mesh = report.attempt(lambda: sharding.make_mesh(**config.mesh))
  setup = report.attempt(abstract_setup, usable)
  if setup is None or mesh is None:
    return
  with jax.set_mesh(mesh):
    before = len(report.problems)
    report.attempt(_heads_divide, setup)
    report.attempt(micro_batches, usable)
    if config.stage == "stage2":
      report.attempt(policy_config, usable)
    state = report.attempt(jax.eval_shape, lambda: initial_state(usable, setup))
    if state is None:
      return
    report.lines += hardware.memory(report, _trees(usable, setup, state), mesh)
    batch = abstract_batch(usable, setup)
    report.lines.append(_encodings(config, batch))
    # Without any reward that is known there is no program of a policy to build.
    if len(report.problems) == before and (usable.rewards or config.stage == "stage1"):
      costs = report.attempt(_trace, usable, setup, state, batch)
      if costs is not None:
        report.lines.append(hardware.time(config, costs))


def _described(config: Any, unreadable: Sequence[str]) -> Any:
  """The configuration with only what is known the shape of."""
  usable = config.copy_and_resolve_references().unlock()
  usable.train.check_numbers = False  # changes no shape, and its programs cannot be traced
  for section in (usable.rewards, usable.eval.rewards):
    for name in [name for name in section if name in device_rewards.NAMES]:
      section[name].update(_published(name, section[name]))
      try:
        abstract_reward(name, section[name])
      except (UserError, *_UNFIT):  # said already, of its files
        del section[name]
  for role in unreadable:  # a path where nothing is stands for an adapter to come
    usable.load[role] = str(Path(usable.load[role]) / "unreadable")
  return usable


def _published(name: str, options: Any) -> dict[str, str]:
  """The published models in place of those of a reward that are neither here nor known."""
  return {
    option: value
    for option, value in device_rewards.published_options(name).items()
    if option in options and not _known(options[option], option_kind(name, option, options))
  }


def _known(value: Any, kind: str | None) -> bool:
  """Whether the config files of a model are here or in the table of published ones."""
  if not isinstance(value, str | os.PathLike) or find(value, kind) is not None:
    return True
  # The config file of weights lies beside them.
  return base_name(Path(value).parent if kind == "file" else value) in PUBLISHED


def _heads_divide(setup: Setup) -> None:
  mesh = sharding.current()
  heads = setup.pipeline.transformer.config.num_attention_heads
  if heads % mesh.shape["tensor"]:
    raise UserError(
      f"mesh.tensor is {mesh.shape['tensor']}, which does not divide the transformer's {heads}"
      " attention heads."
    )


def _trees(config: Any, setup: Setup, state: Any) -> Mapping[str, Any]:
  """Everything that stays on the devices during a run, by name."""
  frozen, mesh = setup.frozen, sharding.current()
  bases, text = (
    sharding.shard_on(tree, mesh, offload=config.model.offload)
    for tree in (frozen.bases, setup.pipeline.text.params)
  )
  return {
    **frozen_trees(config, setup, frozen.replace(bases=bases)),
    "text encoders": text,
    "adapters": (state.generator, state.fake_score),
    "moving average": state.ema,
    "optimizers": (state.generator_opt, state.fake_score_opt),
  }


def _encodings(config: Any, batch: Batch) -> str:
  """A line about the memory of a host that encoded prompts take."""
  one = encoding_bytes(batch)
  return (
    f"encoded prompts: {one / 1e6:.2f} MB each, {one * config.batch.prompts / 1e9:.2f} GB a step; a"
    f" host keeps {config.data.cache_gb:g} GB of the last used (data.cache_gb)"
  )


def _trace(config: Any, setup: Setup, state: Any, batch: Batch) -> dict[str, float]:
  """Runs the programs on shapes, where values that do not fit together meet.

  Returns:
    The operations of each, all devices together.
  """
  known = {"state": state, "frozen": setup.frozen, "batch": batch}
  costs = {}
  programs = step_programs(config, setup)
  compiled = compile_programs(programs, config.seed, check_numbers=config.train.check_numbers)
  for program in programs:
    name, args = program.name, program.arguments(known)
    try:
      traced = compiled[name].trace(*args)
    except _UNFIT as error:
      raise UserError(
        f"the program {name} cannot be made of this configuration: {error}"
      ) from error
    costs[name] = count_flops(traced.jaxpr, loop_turns(name, len(config.dmd.timesteps))[0])
    if name == "rollout":
      score = jax.ShapeDtypeStruct(
        (config.batch.prompts * config.batch.images_per_prompt,), jnp.float32
      )
      known |= {"samples": traced.out_info, "rewards": dict.fromkeys(config.rewards, score)}
  return costs
