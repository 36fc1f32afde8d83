"""Signals that ask a run to stop: a scheduler's SIGTERM and a person's Ctrl-C."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from rtdmd_jax.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_UNSAVED, Stopped

_CODES = {signal.SIGTERM: EXIT_PREEMPTED, signal.SIGINT: EXIT_INTERRUPTED}


class Preemption:
  """Turns SIGTERM and SIGINT into `Stopped`: at once, or in `deferred` when the caller is ready.

  From the signal on, `grace_seconds` remain; then the process ends with `EXIT_UNSAVED`, whatever it
  is doing. A second signal does not wait either. Signals belong to the main thread: entered in
  another one, nothing is installed and the owner of the process decides.
  """

  def __init__(self, grace_seconds: float):
    self._grace = grace_seconds
    self._signal: signal.Signals | None = None
    self._deferred = False
    self._timer: threading.Timer | None = None
    self._previous: dict[signal.Signals, Any] = {}

  def __enter__(self) -> Self:
    if threading.current_thread() is threading.main_thread():
      self._previous = {number: signal.signal(number, self._receive) for number in _CODES}
    return self

  def __exit__(self, *exception: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous = {}
    if self._timer is not None:
      self._timer.cancel()

  @property
  def requested(self) -> bool:
    """Whether a signal has come."""
    return self._signal is not None

  @property
  def number(self) -> int:
    """That of the signal, 0 before one comes."""
    return 0 if self._signal is None else int(self._signal)

  def share(self, number: int) -> None:
    """Takes over the signal, if any, that another process of the run got."""
    if number and self._signal is None:
      self._signal = signal.Signals(number)

  @contextmanager
  def deferred(self) -> Iterator[None]:
    """Inside, a signal only sets `requested`; leaving normally then raises `Stopped`."""
    self._deferred = True
    try:
      yield
    finally:
      self._deferred = False
    if self.requested:
      self.stop("nothing was left to save")

  def stop(self, what: str) -> None:
    """Raises `Stopped` for the signal that came; `what` says how far the run is saved."""
    assert self._signal is not None
    raise Stopped(f"stopped by {self._signal.name}; {what}", _CODES[self._signal])

  def _receive(self, number: int, frame: FrameType | None) -> None:
    again, self._signal = self.requested, signal.Signals(number)
    if again:
      raise Stopped(f"stopped by a second {self._signal.name}; not saved again", EXIT_UNSAVED)
    self._timer = threading.Timer(self._grace, self._expire)
    self._timer.daemon = True
    self._timer.start()
    if not self._deferred:
      self.stop("no step was under way")

  def _expire(self) -> None:
    # No clean-up: whatever hangs would hang again, and a checkpoint appears whole or not at all.
    assert self._signal is not None
    message = f"stopped by {self._signal.name}; not saved within {self._grace:g} s"
    print(message, file=sys.stderr, flush=True)
    os._exit(EXIT_UNSAVED)
