"""Checkpoints of the training state with Orbax."""

import json
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime.checksum import checksums


class Checkpoints:
  """Numbered checkpoints `directory/<step>` of one run, written in the background.

  A checkpoint holds the state's leaves by name, a JSON value and checksums of both; it appears
  under its final name only when complete, and what a killed process left unfinished is removed by
  the next one. Typed PRNG keys are stored as their data and wrapped again on restore.
  """

  def __init__(
    self,
    directory: str | Path,
    *,
    keep: int | None = None,
    keep_every: int | None = None,
    read_only: bool = False,
  ):
    """Open or create `directory`, a local path or a `gs://` one.

    Args:
      directory: where the checkpoints lie.
      keep: how many of the newest stay; None keeps all.
      keep_every: steps divisible by this stay in any case.
      read_only: open an existing directory without writing to it.

    Raises:
      UserError: the directory cannot be written, or does not exist (`read_only`).
    """
    self._directory = epath.Path(directory)
    if read_only:
      if not self._directory.is_dir():
        raise UserError(f"checkpoint directory {directory} does not exist")
    else:
      _check_writable(self._directory)
    # Orbax logs with a traceback what it then raises, and what is raised here is one sentence.
    logging.getLogger("absl").addFilter(_is_news)
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      keep_period=keep_every,
      read_only=read_only,
      create=False,
      cleanup_tmp_directories=not read_only,
    )
    self._place = self._directory.absolute() if "://" not in str(directory) else self._directory
    self._manager = ocp.CheckpointManager(
      self._place,
      options=options,
      # Without handlers a fresh process finds no description of a stored state.
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "extra": ocp.JsonCheckpointHandler(),
      },
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  @property
  def latest_step(self) -> int | None:
    """Step of the newest complete checkpoint, None if there is none."""
    return self._manager.latest_step()

  @property
  def all_steps(self) -> list[int]:
    """Steps of all complete checkpoints, ascending."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: Any, extra: Any) -> bool:
    """Copy `state` to the host and write it in the background.

    Waits for the previous save first. The arrays of `state` may be donated once this returns.

    Args:
      step: number of the checkpoint.
      state: a pytree of arrays; typed PRNG keys are allowed.
      extra: a JSON object (data cursor, versions, ...).

    Returns:
      False if the newest checkpoint already has this step (nothing is written), else True.

    Raises:
      UserError: this or the previous checkpoint cannot be written.
      ValueError: a newer checkpoint exists (see `discard_after`).
    """
    self.wait()
    latest = self.latest_step
    if latest == step:
      return False
    if latest is not None and latest > step:
      raise ValueError(f"checkpoint {step} would be older than {latest}; call discard_after first")
    leaves = {name: _to_data(leaf) for name, leaf in _named_leaves(state).items()}
    sums = checksums(leaves)
    item = {"value": extra, "checksums": sums, "checksum": _json_checksum(extra, sums)}
    with self._writing(step):
      return self._manager.save(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardSave(leaves), extra=ocp.args.JsonSave(item)),
      )

  def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, Any]:
    """Read a checkpoint into the structure, dtypes and shardings of `abstract_state`.

    Args:
      abstract_state: a pytree of arrays or `jax.ShapeDtypeStruct`, with shardings on several
        devices; without one, leaves go to the first local device.
      step: which checkpoint; the newest by default.

    Returns:
      The state and the JSON value saved with it.

    Raises:
      UserError: no such checkpoint, an unreadable one, or one of another structure (the leaf is
        named).
    """
    self.wait()
    step = self._existing(step)
    wanted = _named_leaves(abstract_state)
    abstract = {name: _abstract_data(leaf) for name, leaf in wanted.items()}
    with self._reading(step):
      # Orbax casts and slices silently, so the stored shapes are compared before reading.
      _check_leaves(self._name(step), self._stored_leaves(step), abstract)
      items = self._manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
      )
    data, (extra, sums) = items["state"], self._read_extra(step)
    self._compare(step, data, sums)
    leaves = [_from_data(data[name], leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), extra

  def read_leaves(self, sections: Sequence[str], step: int | None = None) -> dict[str, np.ndarray]:
    """Some leaves of a checkpoint by name, on the host; the other ones are not read.

    Args:
      sections: first parts of the names, such as `"ema"` of `ema/block/a`.
      step: which checkpoint; the newest by default.

    Raises:
      UserError: no such checkpoint, or an unreadable one.
    """
    self.wait()
    step = self._existing(step)
    with self._reading(step):
      stored = self._stored_leaves(step)
      chosen = {n: leaf for n, leaf in stored.items() if n.partition("/")[0] in sections}
      wanted = {n: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for n, leaf in chosen.items()}
      on_host = dict.fromkeys(wanted, ocp.RestoreArgs(restore_type=np.ndarray))
      args = ocp.args.PyTreeRestore(wanted, restore_args=on_host, partial_restore=True)
      with closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as reader:
        data = reader.restore(self._place / str(step) / "state", args=args)
    self._compare(step, data, self._read_extra(step)[1])
    return data

  def read_extra(self, step: int | None = None) -> Any:
    """The JSON value of a checkpoint, of the newest by default, without its state.

    Raises:
      UserError: no such checkpoint, or an unreadable one.
    """
    self.wait()
    return self._read_extra(self._existing(step))[0]

  def discard_after(self, step: int) -> None:
    """Delete the checkpoints newer than `step`, to train on from an older one."""
    self.wait()
    for newer in [s for s in self.all_steps if s > step]:
      self._manager.delete(newer)

  def wait(self) -> None:
    """Block until the checkpoint being written is complete.

    Raises:
      UserError: it cannot be written (a full disk, say); older ones are untouched.
    """
    with self._writing(None):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Finish the checkpoint being written and release the directory; raises what `wait` does."""
    with self._writing(None):
      self._manager.close()

  def _compare(self, step: int, leaves: dict[str, Any], sums: dict[str, int]) -> None:
    """Raises UserError for the first leaf whose values are not those that were written."""
    known = [name for name in sorted(sums) if name in leaves]
    current = checksums({name: leaves[name] for name in known})
    for name in known:
      if current[name] != sums[name]:
        raise UserError(
          f"{self._name(step)} is damaged: the leaf {name} is not what was written; "
          "delete that folder to resume from an earlier one"
        )

  def _name(self, step: int) -> str:
    return f"checkpoint {self._directory / str(step)}"

  def _existing(self, step: int | None) -> int:
    """`step`, or the newest; an error if there is no such checkpoint."""
    steps = self.all_steps
    step = self.latest_step if step is None else step
    if step is None:
      raise UserError(f"{self._directory} holds no checkpoint")
    if step not in steps:
      names = ", ".join(map(str, steps)) or "none"
      raise UserError(f"{self._directory} has no checkpoint {step}; it has {names}")
    return step

  def _read_extra(self, step: int) -> tuple[Any, dict[str, int]]:
    """The JSON value and the leaves' checksums."""
    with self._reading(step):
      item = self._manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore()))
      item = item["extra"]
      if "checksum" not in item:  # written by a version of this package that made none
        return item["value"], {}
      if _json_checksum(item["value"], item["checksums"]) != item["checksum"]:
        raise ValueError("its JSON value is not what was written")
      return item["value"], item["checksums"]

  @contextmanager
  def _reading(self, step: int) -> Iterator[None]:
    try:
      yield
    except UserError:
      raise
    except Exception as error:  # Orbax raises errors of any kind on damaged files, plain ones too
      raise UserError(
        f"{self._name(step)} cannot be read ({_reason(error)}); "
        "delete that folder to resume from an earlier one"
      ) from error

  @contextmanager
  def _writing(self, step: int | None) -> Iterator[None]:
    try:
      yield
    except (ValueError, OSError) as error:
      what = "a checkpoint" if step is None else f"checkpoint {step}"
      steps = ", ".join(map(str, self.all_steps)) or "none"
      raise UserError(
        f"{what} cannot be written to {self._directory} ({_reason(error)}); make room or allow "
        f"writing there and start again (complete checkpoints: {steps})"
      ) from error

  def _stored_leaves(self, step: int) -> dict[str, Any]:
    stored = self._manager.item_metadata(step)["state"]
    if stored is None:
      raise ValueError("its description of the state is missing")
    return dict(stored.tree)


def _is_news(record: logging.LogRecord) -> bool:
  """Whether a line of the log says what is neither raised nor asked for here."""
  known = record.levelno >= logging.ERROR or re.search(r"read.only", record.getMessage())
  return not known or "orbax" not in record.pathname


def _reason(error: Exception) -> str:
  """The end of a message's first line: TensorStore puts the cause behind the paths."""
  line = str(error).strip().partition("\n")[0] or type(error).__name__
  return line if len(line) <= 200 else f"... {line[-196:]}"


def _json_checksum(value: Any, sums: dict[str, int]) -> int:
  return zlib.crc32(json.dumps([value, sums], sort_keys=True).encode())


def _check_writable(directory: epath.Path) -> None:
  probe = directory / f".writable.{jax.process_index()}"
  try:
    directory.mkdir(parents=True, exist_ok=True)
    probe.write_text("")
    probe.unlink()
  except OSError as error:
    raise UserError(f"checkpoint directory {directory} cannot be written: {error}") from error


def _named_leaves(tree: Any) -> dict[str, Any]:
  """Leaves by path, in the order of the tree."""
  leaves = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name in leaves:
      raise ValueError(f"two leaves of the state have the name {name}")
    leaves[name] = leaf
  return leaves


def _is_key(leaf: Any) -> bool:
  return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_data(leaf: Any) -> Any:
  if _is_key(leaf):
    return jax.random.key_data(leaf)
  if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
    raise ValueError(f"leaves of the state must be arrays, got {type(leaf).__name__}")
  if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
    raise ValueError(f"jax would restore a {leaf.dtype} leaf with another dtype; convert it first")
  return leaf


def _from_data(data: jax.Array, like: Any) -> jax.Array:
  if not _is_key(like):
    return data
  implementation = []  # key_impl accepts arrays and tracers, not a ShapeDtypeStruct
  jax.eval_shape(lambda key: implementation.append(jax.random.key_impl(key)), like)
  return jax.random.wrap_key_data(data, impl=implementation[0])


def _abstract_data(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    if jax.process_count() > 1:
      raise ValueError("restoring on several hosts needs a sharding on every leaf")
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if _is_key(leaf):
    leaf = jax.eval_shape(jax.random.key_data, leaf)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_leaves(
  checkpoint: str, stored: dict[str, Any], wanted: dict[str, jax.ShapeDtypeStruct]
) -> None:
  for name in sorted(stored.keys() | wanted.keys()):
    if name not in wanted:
      raise UserError(f"{checkpoint} has a leaf {name} that this configuration does not have")
    if name not in stored:
      raise UserError(f"{checkpoint} lacks the leaf {name} that this configuration has")
    saved, want = stored[name], wanted[name]
    if tuple(saved.shape) != want.shape or saved.dtype != want.dtype:
      raise UserError(
        f"{checkpoint}: leaf {name} is {saved.dtype}{list(saved.shape)}, "
        f"this configuration has {want.dtype}{list(want.shape)}"
      )
