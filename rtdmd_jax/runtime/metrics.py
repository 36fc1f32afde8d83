"""Metrics of a run: `metrics.jsonl` and TensorBoard events."""

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime.files import replace_text
from rtdmd_jax.runtime.wandb_log import WandbRun

FILE_NAME = "metrics.jsonl"


class MetricWriter:
  """Appends metrics to `workdir/metrics.jsonl` and to `workdir/tensorboard`.

  A line of the file is `{"step", "time", "scalars": {name: value}}` with Unix seconds; a value that
  is not finite is null there and listed by name under `nonfinite`. A warning is a line `{"step",
  "time", "warning": sentence}`.
  """

  def __init__(
    self,
    workdir: Path,
    *,
    resume_step: int,
    active: bool = True,
    mirror: WandbRun | None = None,
  ):
    """Open the files of a new or resumed run.

    What an interrupted run wrote after the checkpoint it resumes from is dropped, so curves do not
    overlap.

    Args:
      workdir: folder of the run, created if needed.
      resume_step: last step to keep; -1 for a new run.
      active: False on all hosts but one; nothing is written then.
      mirror: also gets scalars, images and warnings, and is closed with this.

    Raises:
      UserError: the folder cannot be written, or an earlier metrics file is broken.
    """
    self._file, self._mirror = None, mirror if active else None
    if not active:
      return
    from tensorboardX import SummaryWriter  # takes seconds to import, and readers need it not

    # It repeats for every number that is not finite what `nonfinite` and warnings say with names.
    logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)

    path = workdir / FILE_NAME
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      if path.exists():
        _keep_until(path, resume_step)
      self._file = path.open("a", encoding="utf-8")
      self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)
    except OSError as error:
      raise UserError(f"metrics cannot be written to {workdir}: {error}") from error

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    """Write one line of scalars.

    Args:
      step: training step.
      values: numbers or arrays with one element; reading a device array waits for it.

    Raises:
      ValueError: a value has more than one element.
    """
    if self._file is None:
      return
    numbers = {name: _number(name, value) for name, value in values.items()}
    line = {
      "step": int(step),
      "time": round(time.time(), 3),
      "scalars": {name: v if math.isfinite(v) else None for name, v in numbers.items()},
    }
    nonfinite = [name for name, value in numbers.items() if not math.isfinite(value)]
    if nonfinite:
      line["nonfinite"] = nonfinite
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    for name, value in numbers.items():
      self._events.add_scalar(name, value, int(step))
    if self._mirror:
      self._mirror.scalars(int(step), numbers)

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Write a uint8 image `[H, W, 3]` to TensorBoard."""
    if self._file is None:
      return
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
      raise ValueError(f"{name}: need uint8 [H, W, 3], got {image.dtype} {image.shape}")
    self._events.add_image(name, image, int(step), dataformats="HWC")
    if self._mirror:
      self._mirror.image(int(step), name, image)

  def text(self, step: int, name: str, text: str) -> None:
    """Write Markdown text to TensorBoard."""
    if self._file is not None:
      self._events.add_text(name, text, int(step))

  def warning(self, step: int, sentence: str) -> None:
    """Write a warning of the run everywhere, in TensorBoard as the text `warning`."""
    if self._file is None:
      return
    line = {"step": int(step), "time": round(time.time(), 3), "warning": sentence}
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    self.text(step, "warning", sentence)
    if self._mirror:
      self._mirror.warning(int(step), sentence)

  def close(self) -> None:
    """Flush and close the files."""
    if self._file is not None:
      self._file.close()
      self._events.close()
      self._file = None
      if self._mirror:
        self._mirror.close()


def markdown(values: Mapping[str, Any]) -> str:
  """A table of names and values, as `MetricWriter.text` takes it."""
  rows = [f"| {name} | `{str(value).replace('|', '/')}` |" for name, value in values.items()]
  return "\n".join(["| key | value |", "|---|---|", *rows])


def read_metrics(path: Path) -> list[dict[str, Any]]:
  """Lines of a metrics file; an incomplete last line (the writer was killed) is left out.

  Raises:
    UserError: the file is missing or another line is broken.
  """
  try:
    *complete, _ = path.read_text(encoding="utf-8").split("\n")
  except OSError as error:
    raise UserError(f"metrics file {path} cannot be read: {error}") from error
  lines = []
  for number, text in enumerate(complete, start=1):
    try:
      line = json.loads(text)
      lines.append({"step": line["step"], "time": line["time"], **line})
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(f"{path}, line {number}: is not a line of metrics ({error!r})") from error
  return lines


def _keep_until(path: Path, last_step: int) -> None:
  kept = [line for line in read_metrics(path) if line["step"] <= last_step]
  replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def _number(name: str, value: Any) -> float:
  array = np.asarray(value)
  if array.size != 1:
    raise ValueError(f"metric {name} must be a scalar, has shape {array.shape}")
  return float(array.reshape(()))
