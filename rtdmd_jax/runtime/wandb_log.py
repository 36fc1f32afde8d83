"""Weights & Biases beside TensorBoard, under the same names; imported only when used."""

import importlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime.extras import missing

ID_FILE = "wandb_id.txt"


def import_wandb() -> ModuleType:
  """The module `wandb`.

  Raises:
    UserError: it is not installed.
  """
  try:
    return importlib.import_module("wandb")
  except ImportError as error:
    raise missing("log.wandb", error, "wandb", "leave log.wandb false") from error


class WandbRun:
  """One run of Weights & Biases for one workdir, however often it is resumed.

  The variables of wandb itself hold: `WANDB_MODE=offline` keeps everything in the workdir,
  `WANDB_API_KEY` names the account.
  """

  def __init__(self, workdir: Path, *, project: str, config: Mapping[str, Any]):
    """Open the run whose name is in the workdir's `wandb_id.txt`, or a new one.

    Args:
      workdir: folder of the run; its name is shown.
      project: where the run is listed.
      config: settings of the run.

    Raises:
      UserError: wandb is missing, or cannot start (no network, no account).
    """
    self._wandb = import_wandb()
    file = workdir / ID_FILE
    name = file.read_text(encoding="utf-8").strip() if file.exists() else uuid.uuid4().hex
    try:
      self._run = self._wandb.init(
        project=project,
        id=name,
        name=workdir.absolute().name,
        dir=str(workdir),
        config=dict(config),
        resume="allow",
      )
    except self._wandb.Error as error:
      raise UserError(
        f"log.wandb is true, but wandb does not start ({error}); WANDB_MODE=offline needs no"
        " account."
      ) from error
    file.write_text(name + "\n", encoding="utf-8")
    # Not wandb's own step, which may not go back when a run resumes from a checkpoint.
    self._run.define_metric("step")
    self._run.define_metric("*", step_metric="step")

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Log numbers."""
    self._run.log({"step": step, **values})

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Log a uint8 image `[H, W, 3]`."""
    self._run.log({"step": step, name: self._wandb.Image(image)})

  def warning(self, step: int, sentence: str) -> None:
    """Log a warning as the text `warning`; the newest one stands in the run's summary."""
    self._run.log({"step": step, "warning": sentence})

  def close(self) -> None:
    """Send what is left."""
    self._run.finish()
