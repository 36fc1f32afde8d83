"""The description of a pipeline directory, by its config files alone."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from rtdmd_jax.errors import UserError
from rtdmd_jax.models import Transformer, build_transformer
from rtdmd_jax.models.encoders import vae_network
from rtdmd_jax.models.load import base_shapes
from rtdmd_jax.models.network import Network
from rtdmd_jax.models.tokenizer import Limit
from rtdmd_jax.pipeline import components, sampling, text
from rtdmd_jax.pipeline.text import TextDescription
from rtdmd_jax.weights.source import MACHINE, Read, Source, read_file


class Family(NamedTuple):
  """The differences between pipeline classes beyond their networks' configs.

  Attributes:
    schedule: name of the noise schedule.
    text: describes the text encoders, given the directory, its reader and a dtype.
    problems: see `component_problems`, given the contents of model_index.json.
    limits: see `text_limits`.
  """

  schedule: str
  text: Callable[[str | os.PathLike, Read, Any], TextDescription]
  problems: Callable[[Path, Mapping[str, Any]], list[str]]
  limits: Callable[[Path], tuple[Limit, ...]]


_FAMILIES = {
  "StableDiffusion3Pipeline": Family(
    "sd3", text.describe_sd3_text, components.sd3_problems, text.sd3_limits
  ),
  "FluxPipeline": Family(
    "flux1", text.describe_flux1_text, components.flux1_problems, text.flux1_limits
  ),
  "Flux2KleinPipeline": Family(
    "flux2", text.describe_flux2_text, components.flux2_problems, text.flux2_limits
  ),
}
_INDEX = "model_index.json"


def check_components(directory: str | os.PathLike) -> None:
  """Raises UserError with the first of `component_problems`, if there is any."""
  for problem in component_problems(directory):
    raise UserError(problem)


def component_problems(directory: str | os.PathLike) -> list[str]:
  """A sentence for everything in a pipeline's config files that is missing or does not fit.

  That is the pipeline's class, the scheduler, and channels and widths of the networks among each
  other. Weights and tokenizers are not read.

  Args:
    directory: has model_index.json.
  """
  directory = Path(directory)
  read = partial(read_file, directory)
  try:
    family, index = _family(directory, read)
  except UserError as error:
    return [str(error)]
  problems = []
  try:
    _schedule(directory, family, index, read)
  except UserError as error:
    problems.append(str(error))
  return problems + family.problems(directory, index)


def text_limits(directory: str | os.PathLike) -> tuple[Limit, ...]:
  """The limits of the text encoders of a pipeline's directory, by its tokenizers alone.

  Raises:
    UserError: a missing or broken file.
  """
  directory = Path(directory)
  return _family(directory, partial(read_file, directory))[0].limits(directory)


class PipelineDescription(NamedTuple):
  """A pipeline of which only config files have been read.

  Attributes:
    directory: of the pipeline.
    transformer: the velocity network.
    shapes: of its parameters, in the types in which they are kept.
    dtype: of its floating-point parameters.
    storage: of its kernels, a name in `weights.int8.STORAGES`.
    vae: the autoencoder.
    text: the text encoders.
    schedule: of the noise levels.
  """

  directory: Path
  transformer: Transformer
  shapes: Any
  dtype: Any
  storage: str
  vae: Network
  text: TextDescription
  schedule: sampling.Schedule


def describe_pipeline(
  name: str | os.PathLike,
  *,
  source: Source = MACHINE,
  dtype: Any = jnp.float32,
  remat: str = "none",
  attention: str = "auto",
  base_storage: str = "native",
) -> PipelineDescription:
  """Describes a directory with `model_index.json`; see `Pipeline.from_pretrained`.

  Args:
    name: a directory, or a repository.
    source: finds the pipeline and reads its config files.
    dtype: of parameters and computation.
    remat: see `build_transformer`.
    attention: see `build_transformer`.
    base_storage: how the transformer's kernels are kept.

  Raises:
    UserError: a missing or broken config file, a pipeline class or scheduler that is not supported,
      or networks that do not fit each other.
  """
  directory = source.locate(name, "pipeline")
  if directory.is_dir():
    check_components(directory)
  read = partial(source.read, directory)
  family, index = _family(directory, read)
  schedule = _schedule(directory, family, index, read)
  transformer = build_transformer(
    read("transformer/config.json"), dtype=dtype, remat=remat, attention=attention
  )
  return PipelineDescription(
    directory=directory,
    transformer=transformer,
    shapes=base_shapes(transformer, dtype, base_storage),
    dtype=dtype,
    storage=base_storage,
    vae=vae_network(read("vae/config.json"), source=directory / "vae", dtype=dtype),
    text=family.text(directory, read, dtype),
    schedule=schedule,
  )


def _family(directory: Path, read: Read) -> tuple[Family, dict[str, Any]]:
  """A directory's pipeline class, and the contents of its model_index.json."""
  index = read(_INDEX)
  kind = index.get("_class_name")
  if not isinstance(kind, str) or kind not in _FAMILIES:
    raise UserError(
      f"{directory / _INDEX}: _class_name is {kind!r}; supported are {', '.join(_FAMILIES)}."
    )
  return _FAMILIES[kind], index


def _schedule(
  directory: Path, family: Family, index: Mapping[str, Any], read: Read
) -> sampling.Schedule:
  # As in diffusers, model_index.json names the class that reads the scheduler's own file.
  named = index.get("scheduler")
  if isinstance(named, list) and named:
    sampling.check_scheduler(named[-1], directory / _INDEX)
  file = "scheduler/scheduler_config.json"
  return sampling.Schedule.from_config(family.schedule, read(file), source=directory / file)
