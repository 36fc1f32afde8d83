"""Describes the networks and rewards of a run by config files alone."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rtdmd_jax.adapters.load import Lora, load_adapters
from rtdmd_jax.adapters.lora import build_adapters
from rtdmd_jax.errors import UserError
from rtdmd_jax.models import Transformer, build_transformer
from rtdmd_jax.pipeline import Pipeline
from rtdmd_jax.pipeline.describe import PipelineDescription, describe_pipeline
from rtdmd_jax.rewards import device_rewards
from rtdmd_jax.rewards.device.description import RewardDescription
from rtdmd_jax.rewards.held_out_sets import reward_sections
from rtdmd_jax.rewards.multi import RUN_KEYS, build_available
from rtdmd_jax.training.state import Roles
from rtdmd_jax.weights.hub import find
from rtdmd_jax.weights.safetensors import read_config
from rtdmd_jax.weights.source import MACHINE, Source

Tree = Any

ROLES = ("generator", "fake_score", "teacher")


class Description(NamedTuple):
  """A run of which only config files have been read.

  Attributes:
    config: of the run.
    pipeline: the pretrained networks.
    bases: key of each base of the roles in `Frozen.bases`, that of the pipeline first.
    roles: how teacher, generator and fake score are computed.
    rewards: the rewards on the device, those that are only evaluated included.
    unavailable: why such a reward of `eval.rewards` is left out, by name.
    differentiable: names of the rewards to back-propagate.
  """

  config: Any
  pipeline: PipelineDescription
  bases: tuple[str, ...]
  roles: Roles
  rewards: Mapping[str, RewardDescription]
  unavailable: Mapping[str, str]
  differentiable: tuple[str, ...]


def describe(config: Any, source: Source = MACHINE) -> Description:
  """Describes a run of stage 1 or 2.

  Args:
    config: of the run.
    source: finds the models and reads their config files.

  Raises:
    UserError: a missing or broken config file, or values that do not fit together.
  """
  options = reward_options(config)
  described = describe_pipeline(
    config.model.pretrained,
    source=source,
    dtype=jnp.dtype(config.model.dtype),
    remat=config.model.remat,
    attention=config.model.attention,
    base_storage=config.model.base_storage,
  )
  pipeline = Pipeline.abstract(described)
  own, keys = role_bases(config.model, described, source)
  sigmas = pipeline.few_step_sigmas(config.dmd.timesteps, config.model.image_size)
  roles = Roles(
    apply=pipeline.transformer.apply,
    **keys,
    lora_alpha=config.lora.alpha,
    sigmas=jnp.asarray(sigmas),
    latent_shape=pipeline.latent_shape(config.model.image_size),
    embedded_guidance=pipeline.transformer.embedded_guidance,
  )
  rewards, unavailable = available(
    config,
    {
      name: partial(device_rewards.describe, name, chosen, source=source)
      for name, chosen in options.items()
      if name in device_rewards.NAMES
    },
  )
  return Description(
    config=config,
    pipeline=described,
    bases=tuple(dict.fromkeys((own, *keys.values()))),
    roles=roles,
    rewards=rewards,
    unavailable=unavailable,
    differentiable=_differentiable(config, rewards),
  )


def reward_options(config: Any) -> dict[str, dict[str, Any]]:
  """The options that every reward is made with, those in training first.

  Raises:
    UserError: a reward that is both trained and only evaluated, or one that is evaluated and
      back-propagated.
  """
  for name in config.eval.rewards:
    if name in config.rewards:
      raise UserError(f"eval.rewards.{name} is in rewards, too, and is evaluated as it is.")
    if config.eval.rewards[name].get("backpropagate", False):
      raise UserError(
        f"eval.rewards.{name}.backpropagate is true, but eval.rewards are not trained; move it to"
        " rewards, or drop the key."
      )
  return {
    name: {k: v for k, v in reward.items() if k not in RUN_KEYS}
    for _, name, reward in reward_sections(config)
  }


def available(
  config: Any, builders: Mapping[str, Callable[[], Any]]
) -> tuple[dict[str, Any], dict[str, str]]:
  """The results of `builders` by reward, and why one of `eval.rewards` is left out.

  Raises:
    UserError: a wrong option, or a reward to train that cannot be built.
  """
  made, left_out = {}, {}
  for section, needed in ((config.rewards, True), (config.eval.rewards, False)):
    own = {name: builders[name] for name in section if name in builders}
    more, unavailable = build_available(own, allow_unavailable=not needed)
    made |= more
    left_out |= unavailable
  return made, left_out


def role_bases(
  model: Any, pipeline: PipelineDescription, source: Source = MACHINE
) -> tuple[str, dict[str, str]]:
  """The resolved path of the pipeline's own base, and that of each role's.

  Args:
    model: the section of the configuration.
    pipeline: that it names.
    source: finds the roles' bases.

  Raises:
    UserError: a directory of another network.
  """
  own = pipeline.directory / "transformer"
  keys = {}
  for role in ROLES:
    named = model[f"{role}_init"]
    path = source.locate(named, "transformer") if named else own
    # Of a pipeline the transformer is meant, also of one that is not on this machine.
    if path == pipeline.directory or (path / "transformer").is_dir():
      path = path / "transformer"
    keys[role] = _resolved(path)
    if keys[role] != _resolved(own):
      check_base(f"model.{role}_init", path, pipeline.transformer)
  return _resolved(own), keys


def _resolved(path: Path) -> str:
  # A file of the hub's cache is a link to one without a suffix.
  return str(path.resolve() if path.is_dir() else path.parent.resolve() / path.name)


def check_base(key: str, path: Path, transformer: Transformer) -> None:
  """Refuses the directory of another network for a role; a file has no config to compare.

  Args:
    key: of the configuration that names it.
    path: a diffusers transformer directory, or one file of the same network.
    transformer: that of `model.pretrained`.
  """
  if path.is_dir() and build_transformer(read_config(path)).config != transformer.config:
    raise UserError(
      f"{key} is {path}, whose config.json describes another network than that of"
      " model.pretrained; the roles must be of one architecture."
    )


def _differentiable(config: Any, models: Mapping[str, Any]) -> tuple[str, ...]:
  """The rewards to back-propagate."""
  wanted = tuple(n for n in config.rewards if config.rewards[n].get("backpropagate", False))
  for name in wanted:
    if name not in models:
      raise UserError(
        f"rewards.{name}.backpropagate is true, but only {', '.join(device_rewards.NAMES)} have"
        " gradients."
      )
  return wanted


def new_adapters(config: Any, pipeline: Pipeline, key: jax.Array) -> Tree:
  """Fresh adapters of the configured rank, targets and type."""
  transformer = pipeline.transformer
  return build_adapters(
    transformer.init_abstract(),
    transformer.table,
    config.lora.targets,
    rank=config.lora.rank,
    key=key,
    init=config.lora.init,
    dtype=jnp.dtype(config.lora.dtype),
  )


def adapter_shapes(config: Any, path: str, pipeline: Pipeline) -> Tree:
  """Shapes of an earlier stage's adapters; empty without a path.

  Adapters that do not exist yet are taken to have this run's rank and targets.
  """
  if not path:
    return {}
  lora = Lora.parse(path)
  if find(lora.path, "adapter") is None:
    return jax.eval_shape(lambda: new_adapters(config, pipeline, jax.random.key(0)))
  loaded = load_adapters([lora], pipeline.transformer)
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), loaded)
