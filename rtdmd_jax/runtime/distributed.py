"""Joins the processes of a run on several hosts, as the environment says."""

import os
import re
from collections.abc import Mapping
from typing import Any

from rtdmd_jax.errors import UserError

COORDINATOR, PROCESSES, PROCESS = "RTDMD_COORDINATOR", "RTDMD_PROCESSES", "RTDMD_PROCESS"
AUTO = "auto"
_PATIENCE = 60


def arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
  """The arguments of `jax.distributed.initialize`; None for one process.

  `RTDMD_COORDINATOR` is "auto", where jax finds the other processes by itself (TPU pods, GKE,
  Slurm, Open MPI), or the address host:port of process 0, with their number in `RTDMD_PROCESSES`
  and this one's in `RTDMD_PROCESS`.

  Raises:
    UserError: a variable is missing, not a number or not an address.
  """
  coordinator = environment.get(COORDINATOR, "")
  if not coordinator:
    lone = [name for name in (PROCESSES, PROCESS) if name in environment]
    if lone:
      raise UserError(
        f"{lone[0]} is set without {COORDINATOR}; set that to host:port of process 0."
      )
    return None
  if coordinator == AUTO:
    return {}
  if not re.fullmatch(r".+:\d{1,5}", coordinator):
    raise UserError(f"{COORDINATOR} is {coordinator}; write auto, or host:port of process 0.")
  count, number = _number(environment, PROCESSES), _number(environment, PROCESS)
  if not 0 <= number < count:
    raise UserError(f"{PROCESS} is {number}; it counts from 0 and is below {PROCESSES}={count}.")
  return {"coordinator_address": coordinator, "num_processes": count, "process_id": number}


def initialize() -> None:
  """Connects this process with the others; must come before jax looks for devices.

  Raises:
    UserError: see `arguments`, or jax finds no other processes.
  """
  joined = arguments(os.environ)
  if joined is None:
    return
  import jax

  try:
    # A process that ends alone, by an error of its own, ends the others after this time.
    jax.distributed.initialize(**joined, shutdown_timeout_seconds=_PATIENCE)
  except (ValueError, RuntimeError) as error:
    raise UserError(
      f"{COORDINATOR} is {os.environ[COORDINATOR]}, but the processes cannot be joined:"
      f" {str(error).splitlines()[0]}"
    ) from error


def check_alone() -> None:
  """Refuses several processes, for a task that one does by itself.

  Raises:
    UserError: the environment asks for several.
  """
  if arguments(os.environ) is not None:
    raise UserError(f"{COORDINATOR} is set, but pretraining runs in one process; unset it.")


def _number(environment: Mapping[str, str], name: str) -> int:
  try:
    return int(environment[name])
  except (KeyError, ValueError) as error:
    given = environment.get(name, "not set")
    raise UserError(f"{name} is {given}; with {COORDINATOR} it must be a number.") from error
