"""From a configuration to networks, parameters, rewards and prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rtdmd_jax.adapters.load import Lora, load_adapters
from rtdmd_jax.adapters.lora import build_adapters
from rtdmd_jax.datasets.prompts import Prompt, load_prompts
from rtdmd_jax.errors import UserError
from rtdmd_jax.models import Transformer, build_transformer, load_base
from rtdmd_jax.models.vae import decode_images
from rtdmd_jax.pipeline import Pipeline
from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.pipeline.prompt_cache import PromptCache, encoding_chunk
from rtdmd_jax.rewards import device_rewards
from rtdmd_jax.rewards.held_out_sets import HeldOut, held_out_sets, reward_sections, shortages
from rtdmd_jax.rewards.multi import (
  RUN_KEYS,
  MultiReward,
  build_available,
  make,
  make_for_evaluation,
)
from rtdmd_jax.rewards.needs import check_training_prompts
from rtdmd_jax.runtime.multihost import gather, raise_on_all_processes
from rtdmd_jax.runtime.sharding import batch_parts, shard, split_or_replicate
from rtdmd_jax.training.latent_rewards import LatentRewards
from rtdmd_jax.training.settings import Consistency, DMDConfig, OptimizerConfig, PolicyConfig
from rtdmd_jax.training.state import Frozen, Roles
from rtdmd_jax.training.validate import OBJECTIVES, check_policy_steps
from rtdmd_jax.weights.hub import local_path
from rtdmd_jax.weights.safetensors import read_config

Tree = Any


@dataclass(frozen=True)
class Setup:
  """Everything a run reads.

  Attributes:
    pipeline: the pretrained networks.
    roles: how teacher, generator and fake score are computed.
    frozen: their parameters, the decoder's and the rewards'.
    scoring: rewards on the device, and the decoder.
    host_rewards: rewards that need pixels on the host; None if there are none.
    cache: encodings of prompts.
    unconditional: encoding of the empty prompt.
    prompts: to train on.
    held_out: to evaluate on.
    watched: rewards on the device that are evaluated, but not trained (`eval.rewards`).
    watched_host: such rewards on the host; None if there are none.
    unavailable: why a reward on the device of `eval.rewards` is left out, by name.
    held_out_sets: `held_out` and the other prompts to evaluate on, with the rewards of each.
  """

  pipeline: Pipeline
  roles: Roles
  frozen: Frozen
  scoring: LatentRewards
  host_rewards: MultiReward | None
  cache: PromptCache
  unconditional: Conditioning
  prompts: list[Prompt]
  held_out: list[Prompt]
  watched: Mapping[str, Callable[..., jax.Array]] = field(default_factory=dict)
  watched_host: MultiReward | None = None
  unavailable: Mapping[str, str] = field(default_factory=dict)
  held_out_sets: Sequence[HeldOut] = ()


def build(config: Any) -> Setup:
  """Loads everything that `config` names.

  Raises:
    UserError: a missing or broken file, or values that do not fit together; of several processes,
      in all of them.
  """
  with raise_on_all_processes():
    setup = _load(config)
  setup = _available_everywhere(setup)
  models = {n: score.__self__ for n, score in {**setup.scoring.device, **setup.watched}.items()}
  unconditional = jax.tree.map(jnp.asarray, setup.pipeline.encode([""]))
  cache = PromptCache(
    _encoder(setup.pipeline, models),
    chunk=encoding_chunk(config.batch.prompts, batch_parts()),
    max_bytes=config.data.cache_gb * 1e9,
  )
  return replace(setup, cache=cache, unconditional=unconditional)


def _available_everywhere(setup: Setup) -> Setup:
  """Leaves out a watched reward on the device that any process lacks: all run its program."""
  lacking: dict[str, str] = {}
  for number, reasons in enumerate(gather(dict(setup.unavailable))):
    for name, reason in reasons.items():
      where = f"process {number}: " if jax.process_count() > 1 else ""
      lacking.setdefault(name, f"{where}{reason}")
  watched = {name: score for name, score in setup.watched.items() if name not in lacking}
  rewards = {name: p for name, p in setup.frozen.rewards.items() if name not in lacking}
  frozen = setup.frozen.replace(rewards=rewards)
  return replace(setup, watched=watched, frozen=frozen, unavailable=lacking)


def _load(config: Any) -> Setup:
  """Everything but the encodings, which take all processes."""
  # What fails fast comes first.
  prompts = load_prompts(config.data.prompts, split="train", metadata=True)
  held_out = held_out_sets(config)
  options = _reward_options(config)
  _check_prompts(config, prompts, held_out)
  pipeline = Pipeline.from_pretrained(
    config.model.pretrained,
    dtype=jnp.dtype(config.model.dtype),
    remat=config.model.remat,
    attention=config.model.attention,
    base_storage=config.model.base_storage,
    offload=config.model.offload,
  )
  sigmas = pipeline.few_step_sigmas(config.dmd.timesteps, config.model.image_size)
  bases, keys = _bases(config.model, pipeline)
  roles = Roles(
    apply=pipeline.transformer.apply,
    **keys,
    adapter_scale=config.lora.alpha / config.lora.rank,
    sigmas=jnp.asarray(sigmas),
    latent_shape=pipeline.latent_shape(config.model.image_size),
    embedded_guidance=pipeline.transformer.embedded_guidance,
  )
  weights = {name: float(reward.weight) for name, reward in config.rewards.items()}
  models, unavailable = _device_rewards(config, options)
  host = {name: weight for name, weight in weights.items() if name not in device_rewards.NAMES}
  watched = {
    name: options[name] for name in config.eval.rewards if name not in device_rewards.NAMES
  }
  differentiable = _differentiable(config, models)
  scoring = LatentRewards(
    decode=partial(decode_images, pipeline.vae.clone(remat=config.model.remat)),
    device={name: models[name].score for name in models if name in weights},
    weights=weights,
    differentiable=differentiable,
    gradient=device_rewards.gradients({name: models[name] for name in differentiable}),
  )
  frozen = Frozen(
    bases=bases,
    generator=_stage_one(config.load.generator, pipeline),
    fake_score=_stage_one(config.load.fake_score, pipeline),
    vae=pipeline.vae_params,
    rewards={name: model.params for name, model in models.items()},
  )
  return Setup(
    pipeline,
    roles,
    frozen,
    scoring,
    make(host, options=options) if host else None,
    None,
    None,
    prompts,
    held_out[0].prompts,
    {name: models[name].score for name in models if name not in weights},
    make_for_evaluation(watched) if watched else None,
    unavailable,
    held_out,
  )


def _check_prompts(config: Any, prompts: list[Prompt], sets: list[HeldOut]) -> None:
  """Refuses prompts that would end the training; a warning of those that cost scores alone."""
  said = shortages(config, sets)
  if config.stage == "stage2":
    said = [check_training_prompts(config.rewards, prompts, config.data.prompts), *said]
  for sentence in filter(None, said):
    print(f"warning: {sentence}")


def _reward_options(config: Any) -> dict[str, dict[str, Any]]:
  """What every reward is made with, those in training first."""
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


def _device_rewards(
  config: Any, options: Mapping[str, Mapping]
) -> tuple[dict[str, device_rewards.DeviceReward], dict[str, str]]:
  """The rewards on the device, and why one of `eval.rewards` is left out."""
  found, left_out = {}, {}
  for section, needed in ((config.rewards, True), (config.eval.rewards, False)):
    own = {
      n: partial(device_rewards.load, n, options[n]) for n in section if n in device_rewards.NAMES
    }
    made, unavailable = build_available(own, allow_unavailable=not needed)
    found |= made
    left_out |= unavailable
  return found, left_out


def _bases(model: Any, pipeline: Pipeline) -> tuple[dict[str, Tree], dict[str, str]]:
  """Parameters by resolved path, and the path of each role; a path is loaded once."""
  own = local_path(model.pretrained) / "transformer"
  bases, keys = {str(own.resolve()): pipeline.params}, {}
  for role in ("generator", "fake_score", "teacher"):
    named = model[f"{role}_init"]
    path = local_path(named, "transformer") if named else own
    path = path / "transformer" if (path / "transformer").is_dir() else path
    # A file of the hub's cache is a link to one without a suffix.
    path = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    keys[role] = str(path)
    if keys[role] not in bases:
      bases[keys[role]] = _base(path, pipeline.transformer, model, role)
  return bases, keys


def _base(path: Path, transformer: Transformer, model: Any, role: str) -> Tree:
  """A role's own parameters: a diffusers transformer directory, or one file of the same network."""
  if path.is_dir() and build_transformer(read_config(path)).config != transformer.config:
    raise UserError(
      f"model.{role}_init is {path}, whose config.json describes another network than that of"
      " model.pretrained; the roles must be of one architecture."
    )
  return load_base(
    path,
    transformer,
    dtype=jnp.dtype(model.dtype),
    storage=model.base_storage,
    offload=model.offload,
  )


def _differentiable(config: Any, models: dict[str, device_rewards.DeviceReward]) -> tuple[str, ...]:
  """The rewards to back-propagate."""
  wanted = tuple(n for n in config.rewards if config.rewards[n].get("backpropagate", False))
  for name in wanted:
    if name not in models:
      raise UserError(
        f"rewards.{name}.backpropagate is true, but only {', '.join(device_rewards.NAMES)} have"
        " gradients."
      )
  return wanted


def _stage_one(path: str, pipeline: Pipeline) -> Tree:
  """Adapters of an earlier stage with their scale folded in; empty without a path."""
  if not path:
    return {}
  return shard(load_adapters([Lora.parse(path)], pipeline.transformer))


def _encoder(pipeline: Pipeline, models: dict[str, Any]):
  features = {name: jax.jit(model.text_features) for name, model in models.items()}

  def encode(prompts: Sequence[str]) -> Tree:
    text = {
      name: features[name](model.params, split_or_replicate(model.tokenize(prompts)))
      for name, model in models.items()
    }
    return {"conditioning": pipeline.encode(prompts), "reward_text": text}

  return encode


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


def dmd_config(config: Any, pipeline: Pipeline) -> DMDConfig:
  """The typed form of `config.dmd`.

  Raises:
    UserError: an unknown objective.
  """
  if config.dmd.objective not in OBJECTIVES:
    raise UserError(f"dmd.objective is {config.dmd.objective!r}; use {' or '.join(OBJECTIVES)}.")
  values = {k: v for k, v in config.dmd.items() if k not in ("timesteps", "consistency")}
  consistency = Consistency(**config.dmd.consistency)
  return DMDConfig(**values, shift=pipeline.schedule.shift, consistency=consistency)


def optimizer_config(section: Any) -> OptimizerConfig:
  """The typed form of `config.generator` or `config.fake_score`."""
  return OptimizerConfig(**section)


def micro_batches(config: Any) -> int:
  """`config.batch.micro_batches`, into how many parts a batch is cut.

  Raises:
    UserError: it does not divide the batch, or a part does not split over the devices.
  """
  number, count = config.batch.micro_batches, config.batch.prompts * config.batch.images_per_prompt
  if number < 1 or count % number:
    raise UserError(
      f"batch.micro_batches is {number}, which does not divide the batch of {count} images"
      " (batch.prompts x batch.images_per_prompt)."
    )
  parts = batch_parts()
  if count // number % parts:
    raise UserError(
      f"a micro-batch has {count // number} images, which do not split over the {parts} devices of"
      " mesh.data x mesh.fsdp; change batch.prompts, batch.images_per_prompt or"
      " batch.micro_batches."
    )
  return number


def _decode_parts(config: Any) -> int:
  images = (
    config.batch.prompts * config.batch.images_per_prompt // micro_batches(config) // batch_parts()
  )
  at_once = config.batch.decode_chunk or images
  if at_once < 0 or images % at_once:
    raise UserError(
      f"batch.decode_chunk is {at_once}, which does not divide the {images} images of a micro-batch"
      " on a device; use a divisor, or 0 for all of them."
    )
  return images // at_once


def policy_config(config: Any) -> PolicyConfig:
  """The typed form of `config.policy`.

  Raises:
    UserError: no reward, too few steps to choose from, a batch.decode_chunk that does not divide a
      device's images, or see `micro_batches`.
  """
  check_policy_steps(config)
  policy = PolicyConfig(
    **config.policy, micro_batches=micro_batches(config), decode_parts=_decode_parts(config)
  )
  # A group of one has no spread: its advantage is taken over the batch, as the published code does.
  return policy._replace(per_prompt=policy.per_prompt and config.batch.images_per_prompt > 1)
