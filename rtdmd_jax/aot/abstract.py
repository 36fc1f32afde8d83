"""A run made of shapes alone: nothing is loaded, nothing is allocated.

Checkpoints may be missing as long as they are published ones (`weights.published`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from rtdmd_jax.pipeline import Pipeline
from rtdmd_jax.pipeline.describe import describe_pipeline
from rtdmd_jax.rewards import device_rewards
from rtdmd_jax.rewards.multi import RUN_KEYS
from rtdmd_jax.training.describe import ROLES, describe
from rtdmd_jax.training.setup import Setup, abstract
from rtdmd_jax.training.state import Batch, Frozen
from rtdmd_jax.weights.hub import base_name
from rtdmd_jax.weights.published import PUBLISHED_SOURCE


def abstract_setup(config: Any) -> Setup:
  """The setup that `setup.build` makes of `config`, with `jax.ShapeDtypeStruct`s for parameters.

  Adapters of an earlier stage that do not exist yet are taken to have this run's rank and targets.
  Rewards on the host and prompts are left out.

  Raises:
    UserError: neither a checkpoint nor a published one, or an unsupported config.
  """
  return abstract(describe(config, PUBLISHED_SOURCE))


def abstract_batch(config: Any, setup: Setup) -> Batch:
  """The shapes of a training batch."""
  prompts, count = config.batch.prompts, config.batch.prompts * config.batch.images_per_prompt
  index = jax.ShapeDtypeStruct((count,), jnp.int32)
  samples = jax.ShapeDtypeStruct((count,), jnp.uint32)
  encoded = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct((prompts, *s.shape[1:]), s.dtype), setup.unconditional
  )
  text = {
    name: jax.eval_shape(
      score.__self__.text_features,
      setup.frozen.rewards[name],
      jax.ShapeDtypeStruct((prompts, score.__self__.text_length), jnp.int32),
    )
    for name, score in setup.scoring.device.items()
  }
  return Batch(encoded, index, samples, setup.unconditional, text)


def frozen_trees(config: Any, setup: Setup, frozen: Frozen) -> dict[str, Any]:
  """Frozen parameters that stay on the devices during a run, by what a report calls them.

  Args:
    config: of the run.
    setup: of the run.
    frozen: `setup.frozen` as it is placed.
  """
  model, roles = config.model, setup.roles
  names = {getattr(roles, role): model[f"{role}_init"] or model.pretrained for role in ROLES}
  trees: dict[str, Any] = {}
  for key, base in frozen.bases.items():
    title = f"base {base_name(names.get(key, model.pretrained))}"
    trees[f"base {key}" if title in trees else title] = base  # folders may have one name
  for name, params in frozen.rewards.items():
    trees[f"reward {name}, evaluated" if name in setup.watched else f"reward {name}"] = params
  adapters = (frozen.generator, frozen.fake_score)
  return trees | {"autoencoder": frozen.vae, "earlier adapters": adapters}


def abstract_pipeline(
  directory: str,
  dtype: Any,
  *,
  remat: str = "none",
  attention: str = "auto",
  base_storage: str = "native",
) -> Pipeline:
  """`Pipeline.from_pretrained` without parameters, and without tokenizers."""
  return Pipeline.abstract(
    describe_pipeline(
      directory,
      source=PUBLISHED_SOURCE,
      dtype=dtype,
      remat=remat,
      attention=attention,
      base_storage=base_storage,
    )
  )


def abstract_reward(name: str, options: Any) -> device_rewards.DeviceReward:
  """A reward of `device_rewards.NAMES` whose `params` are shapes and whose tokenizer is missing.

  Args:
    name: the reward.
    options: its section of a configuration.

  Raises:
    UserError: a wrong option, or neither files nor published ones.
  """
  own = {key: value for key, value in options.items() if key not in RUN_KEYS}
  return device_rewards.describe(name, own, source=PUBLISHED_SOURCE).model
