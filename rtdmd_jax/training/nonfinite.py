"""Counts updates that were skipped or changed nothing, and ends a run that makes no other."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from rtdmd_jax.errors import EXIT_NUMBERS, Stopped
from rtdmd_jax.runtime.sharding import to_numpy
from rtdmd_jax.training.state import TrainState

NETWORKS = ("generator", "fake_score")
_SHOWN = 5
# Updates in a row that change nothing before the run says so.
_IDLE = 10
_NORMS = ("grad_norm", "update_norm")
_NONE: Mapping[str, Sequence[int]] = MappingProxyType({})


class NonFiniteGuard:
  """Follows the updates of both networks in every step's metrics.

  A step is looked at when the next one has been dispatched, so that the device never waits.
  """

  def __init__(self, limit: int, state: TrainState, counts: Mapping[str, Sequence[int]] = _NONE):
    """Starts counting.

    Args:
      limit: this many skipped updates of one network in a row end the run.
      state: whose adapters are updated.
      counts: of an earlier part of the run, as `counts` gives them.
    """
    self._limit = limit
    self._names = {network: _names(getattr(state, network)) for network in NETWORKS}
    self._rows = dict.fromkeys(NETWORKS, 0)
    self._idle = dict.fromkeys(NETWORKS, 0)
    self._updates, self._totals = (
      {network: counts.get(network, (0, 0))[i] for network in NETWORKS} for i in range(2)
    )
    self._last: tuple[int, dict[str, jax.Array]] | None = None

  def observe(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Takes a step's metrics and looks at those of the step before.

    Raises:
      Stopped: the limit is reached; gradients and losses that are not finite are named.
    """
    self.flush()
    self._last = (step, metrics)

  def flush(self) -> None:
    """Looks at the last step now; raises what `observe` does."""
    if self._last is None:
      return
    (step, metrics), self._last = self._last, None
    for network in NETWORKS:
      if f"{network}/skipped" not in metrics:
        continue
      self._updates[network] += 1
      skipped, norms = jax.device_get(
        [metrics[f"{network}/skipped"], [metrics[f"{network}/{name}"] for name in _NORMS]]
      )
      if not skipped:
        self._rows[network] = 0
        self._count_idle(network, min(norms) == 0)
        continue
      self._rows[network] += 1
      self._totals[network] += 1
      print(f"step {step}: the update of {network} was skipped, its gradient is not finite")
      if self._rows[network] >= self._limit:
        raise Stopped(self._explain(step, network, metrics), EXIT_NUMBERS)

  def _count_idle(self, network: str, idle: bool) -> None:
    """Says once when so many updates in a row have changed nothing."""
    self._idle[network] = self._idle[network] + 1 if idle else 0
    if self._idle[network] == _IDLE:
      print(self._nothing(network, _IDLE))

  def _nothing(self, network: str, count: int) -> str:
    return (
      f"warning: the last {count} updates of {network} changed nothing: its gradient or its"
      f" learning rate is 0. Look at {network}.learning_rate, the weights of policy and rewards,"
      " batch.images_per_prompt, and whether rewards differ between images (samples/kept)"
    )

  def finish(self) -> None:
    """At a run's end: says what never trained.

    Raises:
      Stopped: every update of a network was skipped.
    """
    self.flush()
    for network in NETWORKS:
      updates, skipped = self._updates[network], self._totals[network]
      if updates and updates == skipped:
        raise Stopped(
          f"every update of {network} ({updates:,}) was skipped, as no gradient was finite; nothing"
          " was trained. Look at learning rate, rewards, dmd.eta and model.dtype",
          EXIT_NUMBERS,
        )
      if 0 < self._idle[network] < _IDLE and self._idle[network] == updates:
        print(self._nothing(network, updates))

  def counts(self) -> dict[str, tuple[int, int]]:
    """Updates and skipped updates of each network since the run's first step."""
    return {network: (self._updates[network], self._totals[network]) for network in NETWORKS}

  def totals(self) -> dict[str, float]:
    """Skipped updates since the run's first step, as metrics."""
    return {f"{network}/skipped_total": float(n) for network, n in self._totals.items()}

  def _explain(self, step: int, network: str, metrics: dict[str, jax.Array]) -> str:
    finite = to_numpy(metrics[f"{network}/finite"])
    names = [name for name, fine in zip(self._names[network], finite, strict=True) if not fine]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    others = [
      name
      for name, value in scalars(metrics).items()
      if not np.isfinite(value) and not name.endswith("grad_norm")
    ]
    return (
      f"at step {step} the last {self._limit} updates of {network} had been skipped"
      f" (train.max_skipped); not finite are the gradients of {', '.join(names[:_SHOWN])}{more}"
      + (f", and {', '.join(others)}" if others else "")
      + "; adapters are as they were before, look at learning rate, rewards and model.dtype"
    )


def scalars(metrics: dict[str, Any]) -> dict[str, float]:
  """The metrics that are single numbers, on the host."""
  single = {name: value for name, value in metrics.items() if np.ndim(value) == 0}
  return {name: float(value) for name, value in jax.device_get(single).items()}


def _names(tree: Any) -> list[str]:
  return [
    ".".join(str(part.key) for part in path)
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]
