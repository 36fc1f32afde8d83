"""The networks' files: the pipeline's parts, each role's transformer, adapters of earlier stages.

Files are opened, keys and shapes compared; of values only those of adapters are read.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from rtdmd_jax.adapters.load import Lora, load_adapters
from rtdmd_jax.aot.abstract import abstract_pipeline
from rtdmd_jax.aot.check.files import existing
from rtdmd_jax.aot.check.report import Report
from rtdmd_jax.errors import UserError
from rtdmd_jax.models import Transformer, build_transformer, load_base
from rtdmd_jax.models.encoders import load_vae
from rtdmd_jax.models.tokenizer import load_tokenizer
from rtdmd_jax.pipeline import Pipeline
from rtdmd_jax.pipeline.describe import component_problems
from rtdmd_jax.pipeline.text import encoder_network
from rtdmd_jax.training.describe import ROLES, check_base
from rtdmd_jax.weights.headers import headers_only
from rtdmd_jax.weights.hub import base_name
from rtdmd_jax.weights.published import PUBLISHED
from rtdmd_jax.weights.safetensors import read_config

_SCHEDULER = "scheduler_config.json"


class Networks(NamedTuple):
  """The knowledge of a run's networks.

  Attributes:
    transformer: from its files or as it was published; None if it is not known.
    unreadable: roles whose adapter of an earlier stage is missing, broken or does not fit.
  """

  transformer: Transformer | None
  unreadable: list[str]


def check_networks(report: Report, config: Any) -> Networks:
  """Checks all networks of a run."""
  transformer = _pipeline(report, config)
  for role in ROLES:
    if path := config.model[f"{role}_init"]:
      report.attempt(_role, f"model.{role}_init", path, transformer, config.model)
  unreadable = []
  for role in ("generator", "fake_score"):
    path, before = config.load[role], len(report.problems)
    if path:
      report.attempt(_adapter, f"load.{role}", path, transformer)
    if len(report.problems) > before:
      unreadable.append(role)
  return Networks(transformer, unreadable)


def _pipeline(report: Report, config: Any) -> Transformer | None:
  model, dtype = config.model, jnp.dtype(config.model.dtype)
  if not model.pretrained:
    report.problem("model.pretrained is empty; name a diffusers directory.")
    return None
  directory = report.attempt(existing, "model.pretrained", model.pretrained, "pipeline")
  if directory is None:
    published = base_name(model.pretrained) in PUBLISHED
    return abstract_pipeline(model.pretrained, dtype).transformer if published else None
  if not directory.is_dir():
    report.problem(f"model.pretrained is {model.pretrained}, which is a file, not a directory.")
    return None
  try:
    with headers_only():
      pipeline = Pipeline.from_pretrained(
        directory,
        dtype=dtype,
        remat=model.remat,
        attention=model.attention,
        base_storage=model.base_storage,
      )
      pipeline.latent_shape(model.image_size)
      return pipeline.transformer
  except UserError as error:
    _parts(report, directory, config)
    report.problem(str(error))
    return None


def _parts(report: Report, directory: Path, config: Any) -> None:
  """Checks each part of a directory that does not load, so that all that is wrong is said."""
  index = report.attempt(read_config, directory, "model_index.json")
  if index is None:
    return
  for sentence in component_problems(directory):
    report.problem(sentence)
  for name, made_by in sorted(index.items()):
    if isinstance(made_by, list) and len(made_by) == 2 and None not in made_by:
      with headers_only():
        report.attempt(_part, directory, name, made_by[1], config.model)


def _part(directory: Path, name: str, kind: Any, model: Any) -> None:
  """Loads one part of a pipeline without its values; parts that no run reads are left alone."""
  path = directory / name
  if name == "scheduler":
    read_config(path, _SCHEDULER)
  elif name == "transformer":
    load_base(path, build_transformer(read_config(path)), dtype=jnp.dtype(model.dtype))
  elif name == "vae":
    load_vae(path)
  elif name.startswith("tokenizer"):
    load_tokenizer(path)
  elif name.startswith("text_encoder"):
    dtype = jnp.dtype(model.dtype)
    encoder_network(kind, read_config(path), source=path, dtype=dtype).load(path)


def _role(key: str, value: str, transformer: Transformer | None, model: Any) -> None:
  """A role's own transformer: a directory of diffusers, that of a pipeline, or one file."""
  path = existing(key, value, "transformer")
  path = path / "transformer" if (path / "transformer").is_dir() else path
  if transformer is not None:
    check_base(key, path, transformer)
  own = build_transformer(read_config(path)) if path.is_dir() else None
  if (network := own or transformer) is not None:
    with headers_only():
      load_base(path, network, dtype=jnp.dtype(model.dtype))


def _adapter(key: str, value: str, transformer: Transformer | None) -> None:
  """An adapter of an earlier stage."""
  lora = Lora.parse(value)
  path = existing(key, lora.path, "adapter", "run the earlier stage first")
  if transformer is not None:
    try:
      load_adapters([lora._replace(path=path)], transformer)
    except UserError as error:
      raise UserError(f"{key}: {error}") from error
