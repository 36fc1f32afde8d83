"""One run at a time in a workdir.

The lock is a file, so it holds for all machines that share the folder. Locks of a process that was
killed are told by its pid on its own machine, and elsewhere by a heartbeat that has stopped.
"""

import datetime
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Self

from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime.files import replace_text

FILE_NAME = "run.lock"


class WorkdirLock:
  """Keeps other runs out of a workdir, as a context; the folder is made if need be.

  The file says who holds it. Its heartbeat is a number that the holder raises all the time; whoever
  waits for it looks whether it moves, so clocks of different machines need not agree.
  """

  def __init__(self, workdir: Path, *, beat: float = 15.0, patience: float = 120.0):
    """`beat`: seconds between heartbeats; `patience`: without one for so long a holder is dead."""
    self._workdir, self._file = workdir, workdir / FILE_NAME
    self._beat, self._patience = beat, patience
    self._end = threading.Event()
    self._thread: threading.Thread | None = None
    started = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    self._own = _here() | {"started": started, "token": uuid.uuid4().hex, "beat": 0}

  def __enter__(self) -> Self:
    """Takes the lock.

    Raises:
      UserError: another run holds it, or the folder cannot be made or written to.
    """
    try:
      self._workdir.mkdir(parents=True, exist_ok=True)
      while not self._create():
        holder = _read(self._file)
        if holder is not None:
          if self._alive(holder):
            raise UserError(self._refusal(holder))
          self._remove(holder)
    except OSError as error:
      raise UserError(
        f"--workdir={self._workdir} cannot be used ({error.strerror or error}); give a folder that"
        " can be made and written to."
      ) from error
    self._thread = threading.Thread(target=self._keep_beating, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._end.set()
    if self._thread is not None:
      self._thread.join()
    if self._is_own():
      self._file.unlink(missing_ok=True)

  def _create(self) -> bool:
    try:
      number = os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
      return False
    try:
      with os.fdopen(number, "w", encoding="utf-8") as file:
        file.write(json.dumps(self._own))
    except OSError:
      self._file.unlink(missing_ok=True)
      raise
    return True

  def _alive(self, holder: dict[str, Any]) -> bool:
    """Whether the holder's process exists or, out of sight, its heartbeat moves."""
    if all(holder.get(key) == self._own[key] for key in ("host", "boot", "namespace")):
      start = _start_of(holder.get("pid"))
      return start is not None and start == holder.get("pid_start")
    print(f"{self._file}: waiting up to {self._patience:g} s for a sign of the run that holds it")
    deadline = time.monotonic() + self._patience
    while time.monotonic() < deadline:
      time.sleep(min(self._beat, self._patience) / 5)
      now = _read(self._file)
      if now != holder:
        return now is not None
    return False

  def _refusal(self, holder: dict[str, Any]) -> str:
    who = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('started')}"
    return (
      f"another run is using {self._workdir} ({who}); wait for it or stop it, or give another"
      f" --workdir; if there is none, delete {self._file}."
    )

  def _remove(self, holder: dict[str, Any]) -> None:
    """Takes a dead run's lock away, and nothing that came into its place meanwhile."""
    aside = self._file.with_name(f"{FILE_NAME}.{self._own['token']}")
    try:
      self._file.rename(aside)
    except FileNotFoundError:
      return
    if (_read(aside) or {}).get("token") != holder.get("token") and not self._file.exists():
      aside.rename(self._file)
    aside.unlink(missing_ok=True)

  def _is_own(self) -> bool:
    return (_read(self._file) or {}).get("token") == self._own["token"]

  def _keep_beating(self) -> None:
    while not self._end.wait(self._beat):
      try:
        if self._is_own():
          self._own["beat"] += 1
          replace_text(self._file, json.dumps(self._own))
      except OSError:  # a full disk must not end the run here; saving says so
        continue


def _read(file: Path) -> dict[str, Any] | None:
  """Who holds a lock; None if nobody does any more."""
  try:
    value = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return None
  except ValueError:  # its holder was killed, or is about to write it
    value = {}
  return value if isinstance(value, dict) else {}


def _here() -> dict[str, Any]:
  """This process, and the machine or container within which its pid means it."""
  pid = os.getpid()
  return {
    "host": socket.gethostname(),
    "boot": _text("/proc/sys/kernel/random/boot_id"),
    "namespace": _link("/proc/self/ns/pid"),
    "pid": pid,
    "pid_start": _start_of(pid),
  }


def _start_of(pid: Any) -> str | None:
  """When a live process of this machine started, in the system's own units; None without it.

  Pids are used again, pairs of pid and start are not. Where the system does not say, "unknown".
  """
  if not isinstance(pid, int):
    return None
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return None
  except PermissionError:  # it is somebody else's
    pass
  # The name, in brackets, may hold spaces.
  fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
  if fields[:1] == ["Z"]:  # killed, and nobody has asked how it ended
    return None
  return fields[19] if len(fields) > 19 else "unknown"


def _text(path: str) -> str:
  try:
    return Path(path).read_text(encoding="utf-8").strip()
  except OSError:
    return ""


def _link(path: str) -> str:
  try:
    return os.readlink(path)
  except OSError:
    return ""
