"""Messages between the processes of a run; a single process talks to itself.

Every function here that tells or asks must be called by all processes, in the same order.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import rtdmd_jax
from rtdmd_jax.config import config_diff
from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime.sharding import AXES, current

_SHOWN = 6


def is_main() -> bool:
  """Whether this process writes the run's files: process 0 does."""
  return jax.process_index() == 0


@contextlib.contextmanager
def silence_other_processes() -> Iterator[None]:
  """Inside, only the main process prints to stdout; errors of every process are seen."""
  with contextlib.nullcontext() if is_main() else contextlib.redirect_stdout(io.StringIO()):
    yield


def gather(value: Any) -> list[Any]:
  """The JSON value of each process, in their order."""
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array(text.size, np.int32))
  # A power of two, so that few programs are compiled.
  width = 1 << max(int(sizes.max()) - 1, 255).bit_length()
  texts = multihost_utils.process_allgather(np.pad(text, (0, width - text.size)))
  return [json.loads(t[:n].tobytes()) for t, n in zip(texts, sizes, strict=True)]


@contextlib.contextmanager
def raise_on_all_processes() -> Iterator[None]:
  """A `UserError` inside ends all processes with it, so that none is left waiting.

  What is inside must not wait for other processes.
  """
  own = None
  try:
    yield
  except UserError as error:
    own = error
  sentences = gather(None if own is None else str(own))
  if own is not None:
    raise own
  for number, sentence in enumerate(sentences):
    if sentence is not None:
      raise UserError(f"process {number}: {sentence}")


def assert_equal(facts: dict[str, Any]) -> None:
  """Compares nested dicts of JSON values with those of process 0.

  Raises:
    UserError: in all processes; the first one that differs and the keys are named.
  """
  first, *others = gather(facts)
  for number, other in enumerate(others, start=1):
    lines = config_diff(first, other)
    if lines:
      more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
      raise UserError(
        f"process {number} differs from process 0 in {'; '.join(lines[:_SHOWN])}{more}; start all"
        " processes with the same command, code, files and workdir"
      )


class AsyncMax:
  """The largest number that any process gives, the same in all of them.

  With several processes it is that of the call before, so that no call waits for a device that is
  still busy with what was dispatched since.
  """

  def __init__(self):
    self._before: jax.Array | None = None

  def __call__(self, number: int) -> int:
    """The largest number so far; `number` is not negative, and 0 until somebody gives another."""
    if jax.process_count() == 1:
      return number
    mesh = current()
    assert mesh is not None  # a run of several processes has one
    every = NamedSharding(mesh, PartitionSpec(AXES))
    one = np.full(1, number, np.int32)
    given = jax.make_array_from_callback((mesh.size,), every, lambda _: one)
    before, self._before = self._before, _largest(given)
    return 0 if before is None else int(jax.device_get(before))


@jax.jit
def _largest(numbers: jax.Array) -> jax.Array:
  return jnp.max(numbers)


def digest(value: Any) -> str:
  """Twelve hexadecimal digits of a JSON value."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def file_digest(path: Path) -> str | None:
  """Twelve hexadecimal digits of a file's bytes; None without it."""
  return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else None


def code_digest() -> str:
  """Twelve hexadecimal digits of this package's source."""
  folder = Path(rtdmd_jax.__file__).parent
  files = sorted(folder.rglob("*.py"))
  return digest([[str(f.relative_to(folder)), file_digest(f)] for f in files])
