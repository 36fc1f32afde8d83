"""Keeps what users' rewards do to the process from reaching other rewards and the run.

Rewards are code of others that runs inside the training process, beside each other. What they are
given is theirs, and what they change of the process is put back after each batch.
"""

import contextlib
import copy
import io
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np

# Characters that the rewards of a batch may print.
_PRINTED = 2000
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_logger = logging.getLogger(__name__)

Inputs = tuple[np.ndarray, list[str], list[Any] | None]
Records = Sequence[Mapping] | None


def own_inputs(images: np.ndarray, prompts: Sequence[str], records: Records) -> Inputs:
  """The same batch, of which nothing that one reward changes is seen by another.

  Images are a view that cannot be written to, as copies for every reward take too much memory.
  """
  images = images.view()
  images.flags.writeable = False
  return images, list(prompts), None if records is None else copy.deepcopy(list(records))


def contained(
  reward: Callable[..., Any], images: np.ndarray, prompts: Sequence[str], records: Records
) -> Any:
  """The value that a reward returns for `own_inputs`, called in a thread of its own.

  Raises:
    RuntimeError: it raised what would have ended the program, such as `SystemExit`.
    Exception: any other that it raised.
  """
  try:
    return reward(*own_inputs(images, prompts, records))
  except Exception:
    raise
  except BaseException as error:  # not Ctrl-C, which arrives in the main thread
    raise RuntimeError(described(error)) from error


def described(error: BaseException) -> str:
  """Type, text and place of an error in code of others, on one line."""
  text = " ".join(str(error).split())[:300]
  frames = traceback.extract_tb(error.__traceback__)
  place = f" ({frames[-1].filename} line {frames[-1].lineno})" if frames else ""
  return f"{type(error).__name__}{f': {text}' if text else ''}{place}"


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
  """Puts back the process as it was, with a warning where what was changed would have hurt the run.

  That is the working directory, jax's settings, handlers of signals (in the main thread, where they
  can be set), logging, filters of warnings and numpy's reaction to errors. Of what is printed
  meanwhile the first 2,000 characters are shown.
  """
  folder, settings = os.getcwd(), dict(jax.config.values)
  main = threading.current_thread() is threading.main_thread()
  handlers = {number: signal.getsignal(number) for number in _SIGNALS} if main else {}
  root = logging.getLogger()
  logs = root.level, list(root.handlers), root.manager.disable
  shown = _Some(sys.stdout)
  try:
    with warnings.catch_warnings(), np.errstate(), contextlib.redirect_stdout(shown):
      yield
  finally:
    root.setLevel(logs[0])
    root.handlers[:] = logs[1]
    logging.disable(logs[2])
    changed = [name for name, value in settings.items() if jax.config.values[name] != value]
    for name in changed:
      jax.config.update(name, settings[name])
    for number, handler in handlers.items():
      if signal.getsignal(number) is not handler:
        signal.signal(number, handler)
        changed.append(f"the handler of {signal.Signals(number).name}")
    if _folder() != folder:
      os.chdir(folder)
      changed.append("the working directory")
    if changed:
      _logger.warning("a reward changed %s; it is put back", ", ".join(changed))


def _folder() -> str | None:
  try:
    return os.getcwd()
  except OSError:  # a reward went to a folder that it removed
    return None


class _Some(io.TextIOBase):
  """Passes on the beginning of what is written."""

  def __init__(self, stream: TextIO):
    super().__init__()
    self._stream, self._left = stream, _PRINTED

  def write(self, text: str) -> int:
    """Writes as much of the text as still has room."""
    if self._left > 0:
      self._stream.write(text[: self._left])
      if len(text) > self._left:
        self._stream.write("\n... (rewards print more than is shown)\n")
    self._left -= len(text)
    return len(text)

  def flush(self) -> None:
    """As the stream does."""
    self._stream.flush()
