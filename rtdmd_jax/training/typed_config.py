"""Sections of a configuration as typed settings, checked against the devices of the run."""

from typing import Any

from rtdmd_jax.errors import UserError
from rtdmd_jax.pipeline import Pipeline
from rtdmd_jax.runtime.sharding import batch_parts
from rtdmd_jax.training.settings import Consistency, DMDConfig, OptimizerConfig, PolicyConfig
from rtdmd_jax.training.validate import OBJECTIVES, check_policy_steps


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
