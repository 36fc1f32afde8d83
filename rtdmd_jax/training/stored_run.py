"""A training run as it lies in its workdir: its configuration and the adapters of a checkpoint."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from rtdmd_jax.adapters.load import Lora, load_adapters
from rtdmd_jax.adapters.lora import fold_scale, stack_adapters
from rtdmd_jax.config import with_current_names
from rtdmd_jax.errors import UserError
from rtdmd_jax.models import load_base
from rtdmd_jax.models.transformer import Transformer
from rtdmd_jax.pipeline import Pipeline
from rtdmd_jax.runtime.checkpoint import Checkpoints
from rtdmd_jax.runtime.sharding import to_numpy
from rtdmd_jax.training.resume import read_stored_config
from rtdmd_jax.weights.hub import find, local_path

Tree = Any
ROLES = ("generator", "fake_score")
FLAG_HELP = "WORKDIR (the newest) or WORKDIR:STEP of a training run."
IN_TRAINING = "adapters in training"


def generator_weights(ema: Tree, trained: Tree, settings: Mapping[str, Any]) -> tuple[Tree, str]:
  """The adapters that a run's generator is exported with, and in words which they are.

  That is the moving average. One that has not moved from its start, which changes nothing, is not
  worth exporting: the adapters in training stand in then.

  Args:
    ema: the moving average.
    trained: the adapters in training.
    settings: `ema` of the run's configuration.
  """
  if _moved(ema):
    follows = settings["decay"] == 0 and settings["every"] == 1
    return ema, IN_TRAINING if follows else "moving average"
  if _moved(trained):
    return trained, f"{IN_TRAINING}, as the moving average has not moved yet"
  return ema, "the start, as the generator has not been updated yet"


def _moved(adapters: Tree) -> bool:
  """Whether adapters change anything: `b` starts at 0."""
  parts = [leaf for path, leaf in flatten_dict(adapters).items() if path[-1] == "b"]
  return bool(to_numpy(_any(parts)))


@jax.jit
def _any(arrays: list[jax.Array]) -> jax.Array:
  return jnp.any(jnp.stack([jnp.any(array != 0) for array in arrays]))


class StoredRun(NamedTuple):
  """A checkpoint of a run.

  Attributes:
    workdir: of the run.
    step: of the checkpoint.
    config: with which the checkpoint was written, as nested dicts.
  """

  workdir: Path
  step: int
  config: Mapping[str, Any]

  @classmethod
  def parse(cls, text: str) -> "StoredRun":
    """Finds the checkpoint `WORKDIR:STEP`, or the newest one of `WORKDIR`.

    Raises:
      UserError: no such folder, no checkpoints in it, or not this one (those there are named).
    """
    workdir, step = Path(text), None
    before, colon, after = text.rpartition(":")
    if colon and after.isdecimal() and not workdir.exists():
      workdir, step = Path(before), int(after)
    if not workdir.is_dir():
      raise UserError(f"--checkpoint={text}: {workdir} is not a folder; give WORKDIR:STEP.")
    if not (workdir / "checkpoints").is_dir():
      raise UserError(
        f"--checkpoint={text}: {workdir} holds no checkpoints/; give the --workdir of a training"
        " run that has saved one."
      )
    with _opened(workdir) as saved:
      extra = saved.read_extra(step)
      step = saved.latest_step if step is None else step
    # Those of earlier versions of this package have none of their own.
    stored = extra if isinstance(extra, dict) else {}
    config = stored.get("config") or read_stored_config(workdir / "config.json")
    return cls(workdir, step, with_current_names(config))

  @property
  def directory(self) -> Path:
    """The folder of the checkpoint."""
    return self.workdir / "checkpoints" / str(self.step)

  def base(self, role: str = "generator") -> str:
    """The base of a role's adapters: a pipeline, a transformer directory or a file."""
    return self.config["model"][f"{role}_init"] or self.config["model"]["pretrained"]

  def pipeline(self, dtype: Any) -> Pipeline:
    """The pipeline that the generator draws with, on the current mesh, as `from_pretrained`."""
    pipeline = Pipeline.from_pretrained(self.config["model"]["pretrained"], dtype=dtype)
    if not self.config["model"]["generator_init"]:
      return pipeline
    own = local_path(self.base(), "transformer")
    own = own / "transformer" if (own / "transformer").is_dir() else own
    pipeline = replace(pipeline, params=None)  # makes room
    return replace(pipeline, params=load_base(own, pipeline.transformer, dtype=dtype))

  def adapters(self, transformer: Transformer, role: str = "generator") -> tuple[Tree, str]:
    """The adapters of the generator (see `generator_weights`) or the fake score.

    Args:
      transformer: what they adapt.
      role: one of `ROLES`.

    Returns:
      The adapter tree with its scale folded in, those of the earlier stage included, and in words
      which weights these are.

    Raises:
      UserError: a broken checkpoint, or the earlier stage's adapters are not where they were.
    """
    sections = ("ema", "generator") if role == "generator" else (role,)
    with _opened(self.workdir) as saved:
      leaves = saved.read_leaves(sections, self.step)
    trees = unflatten_dict({tuple(name.split("/")): leaf for name, leaf in leaves.items()})
    if role == "generator":
      own, words = generator_weights(trees["ema"], trees["generator"], self.config["ema"])
    else:
      own, words = trees[role], IN_TRAINING
    earlier = self.config["load"][role]
    if earlier and find(Lora.parse(earlier).path, "adapter") is None:
      raise UserError(
        f"{self.directory} adds to the earlier stage's adapters in {earlier}, which are not there;"
        " put them back, or run this in the folder that the run was started in."
      )
    below = load_adapters([Lora.parse(earlier)] if earlier else [], transformer)
    own = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), own)
    return stack_adapters(below, fold_scale(own, self.config["lora"]["alpha"])), words


def _opened(workdir: Path) -> Checkpoints:
  return Checkpoints(workdir / "checkpoints", read_only=True)
