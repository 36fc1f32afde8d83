"""Sets up everything that a run reads, as arrays or as their shapes.

`describe.describe` reads config files alone. `load` fills the arrays of a description, `abstract`
puts shapes in their place; both make the same `Setup`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rtdmd_jax.adapters.load import Lora, load_adapters
from rtdmd_jax.datasets.prompts import Prompt, load_prompts
from rtdmd_jax.models import load_base
from rtdmd_jax.models.tokenizer import no_tokenizer
from rtdmd_jax.models.vae import decode_images
from rtdmd_jax.pipeline import Pipeline
from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.pipeline.describe import PipelineDescription
from rtdmd_jax.pipeline.prompt_cache import PromptCache, encoding_chunk
from rtdmd_jax.rewards import device_rewards
from rtdmd_jax.rewards.held_out_sets import HeldOut, held_out_sets, shortages
from rtdmd_jax.rewards.multi import MultiReward, make, make_for_evaluation
from rtdmd_jax.rewards.needs import check_training_prompts
from rtdmd_jax.runtime.multihost import gather, raise_on_all_processes
from rtdmd_jax.runtime.sharding import batch_parts, shard, split_or_replicate
from rtdmd_jax.training.describe import (
  Description,
  adapter_shapes,
  available,
  describe,
  reward_options,
)
from rtdmd_jax.training.latent_rewards import LatentRewards
from rtdmd_jax.training.state import Frozen, Roles

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
  host_rewards: MultiReward | None = None
  cache: PromptCache = field(default_factory=lambda: PromptCache(no_tokenizer))
  unconditional: Conditioning | None = None
  prompts: Sequence[Prompt] = ()
  held_out: Sequence[Prompt] = ()
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
    # What fails fast comes first.
    prompts = load_prompts(config.data.prompts, split="train", metadata=True)
    held_out = held_out_sets(config)
    _check_prompts(config, prompts, held_out)
    setup = load(describe(config))
  setup = _available_everywhere(setup)
  models = {n: score.__self__ for n, score in {**setup.scoring.device, **setup.watched}.items()}
  unconditional = jax.tree.map(jnp.asarray, setup.pipeline.encode([""]))
  cache = PromptCache(
    _encoder(setup.pipeline, models),
    chunk=encoding_chunk(config.batch.prompts, batch_parts()),
    max_bytes=config.data.cache_gb * 1e9,
  )
  return replace(
    setup,
    cache=cache,
    unconditional=unconditional,
    prompts=prompts,
    held_out=held_out[0].prompts,
    held_out_sets=held_out,
  )


def _check_prompts(config: Any, prompts: list[Prompt], sets: list[HeldOut]) -> None:
  """Refuses prompts that would end the training; a warning of those that cost scores alone."""
  said = shortages(config, sets)
  if config.stage == "stage2":
    said = [check_training_prompts(config.rewards, prompts, config.data.prompts), *said]
  for sentence in filter(None, said):
    print(f"warning: {sentence}")


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


class Values(NamedTuple):
  """The values of a description's networks: arrays, or shapes of them.

  Attributes:
    pipeline: the pretrained networks.
    bases: parameters of the roles' bases, by key.
    generator, fake_score: adapters of an earlier stage with their scale folded in.
    rewards: the rewards on the device, by name.
  """

  pipeline: Pipeline
  bases: Mapping[str, Tree]
  generator: Tree
  fake_score: Tree
  rewards: Mapping[str, device_rewards.DeviceReward]


def abstract(description: Description) -> Setup:
  """The setup of a description with shapes for parameters; nothing is loaded or allocated.

  It has no prompts and no rewards on the host, and its cache encodes nothing.

  Raises:
    UserError: a broken adapter of an earlier stage.
  """
  config, pipeline = description.config, Pipeline.abstract(description.pipeline)
  values = Values(
    pipeline=pipeline,
    bases=dict.fromkeys(description.bases, pipeline.params),
    generator=adapter_shapes(config, config.load.generator, pipeline),
    fake_score=adapter_shapes(config, config.load.fake_score, pipeline),
    rewards={name: described.model for name, described in description.rewards.items()},
  )
  return replace(
    _assemble(description, values),
    unavailable=description.unavailable,
    unconditional=description.pipeline.text.conditioning(),
  )


def load(description: Description) -> Setup:
  """Fills the arrays of a description; prompts and their encodings are left to `build`.

  Raises:
    UserError: a missing or broken file, or values that do not fit together.
  """
  config, options = description.config, reward_options(description.config)
  pipeline = Pipeline.load(description.pipeline, offload=config.model.offload)
  bases = load_bases(
    description.pipeline, description.bases, pipeline.params, offload=config.model.offload
  )
  rewards, unavailable = available(
    config, {name: described.load for name, described in description.rewards.items()}
  )
  on_host = {
    name: float(reward.weight)
    for name, reward in config.rewards.items()
    if name not in device_rewards.NAMES
  }
  watched = {
    name: options[name] for name in config.eval.rewards if name not in device_rewards.NAMES
  }
  host_rewards = make(on_host, options=options) if on_host else None
  watched_host = make_for_evaluation(watched) if watched else None
  values = Values(
    pipeline=pipeline,
    bases=bases,
    generator=_stage_one(config.load.generator, pipeline),
    fake_score=_stage_one(config.load.fake_score, pipeline),
    rewards=rewards,
  )
  return replace(
    _assemble(description, values),
    host_rewards=host_rewards,
    watched_host=watched_host,
    unavailable={**description.unavailable, **unavailable},
  )


def _assemble(description: Description, values: Values) -> Setup:
  """The setup of a description, of arrays or of shapes."""
  config, pipeline, models = description.config, values.pipeline, values.rewards
  weights = {name: float(reward.weight) for name, reward in config.rewards.items()}
  scoring = LatentRewards(
    decode=partial(decode_images, pipeline.vae.clone(remat=config.model.remat)),
    device={name: models[name].score for name in models if name in weights},
    weights=weights,
    differentiable=description.differentiable,
    gradient=device_rewards.gradients({name: models[name] for name in description.differentiable}),
  )
  frozen = Frozen(
    bases=dict(values.bases),
    generator=values.generator,
    fake_score=values.fake_score,
    vae=pipeline.vae_params,
    rewards={name: model.params for name, model in models.items()},
  )
  return Setup(
    pipeline=pipeline,
    roles=description.roles,
    frozen=frozen,
    scoring=scoring,
    watched={name: models[name].score for name in models if name not in weights},
  )


def load_bases(
  described: PipelineDescription, keys: Sequence[str], params: Tree, *, offload: bool = False
) -> dict[str, Tree]:
  """Parameters of the roles' bases by key; a base is loaded once.

  Args:
    described: the pipeline.
    keys: of the bases, that of the pipeline first; see `describe.role_bases`.
    params: of the pipeline's transformer, which are loaded already.
    offload: see `load_base`.
  """
  own, *others = dict.fromkeys(keys)
  storage = {"dtype": described.dtype, "storage": described.storage, "offload": offload}
  return {own: params} | {
    key: load_base(Path(key), described.transformer, **storage) for key in others
  }


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
