"""Counts updates that were skipped, and ends a run that makes no other."""

from typing import Any

import jax
import numpy as np

from rtdmd_jax.errors import EXIT_NUMBERS, Stopped
from rtdmd_jax.sharding import fetch
from rtdmd_jax.state import TrainState

_SHOWN = 5


class Skips:
  """Follows `<network>/skipped` and `<network>/finite` of every step's metrics.

  A step is looked at when the next one has been dispatched, so that the device never waits.
  """

  def __init__(self, limit: int, state: TrainState):
    """`limit` skipped updates of one network in a row end the run."""
    self._limit = limit
    self._names = {network: _names(getattr(state, network)) for network in _NETWORKS}
    self._rows = dict.fromkeys(_NETWORKS, 0)
    self._totals = dict.fromkeys(_NETWORKS, 0)
    self._last: tuple[int, dict[str, jax.Array]] | None = None

  def follow(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Takes a step's metrics and looks at those of the step before.

    Raises:
      Stopped: the limit is reached; gradients and losses that are not finite are named.
    """
    self.look()
    self._last = (step, metrics)

  def look(self) -> None:
    """Looks at the last step now; raises what `follow` does."""
    if self._last is None:
      return
    (step, metrics), self._last = self._last, None
    for network in _NETWORKS:
      if f"{network}/skipped" not in metrics:
        continue
      if not jax.device_get(metrics[f"{network}/skipped"]):
        self._rows[network] = 0
        continue
      self._rows[network] += 1
      self._totals[network] += 1
      print(f"step {step}: the update of {network} was skipped, its gradient is not finite")
      if self._rows[network] >= self._limit:
        raise Stopped(self._explain(step, network, metrics), EXIT_NUMBERS)

  def totals(self) -> dict[str, float]:
    """Skipped updates since the start, as metrics."""
    return {f"{network}/skipped_total": float(n) for network, n in self._totals.items()}

  def _explain(self, step: int, network: str, metrics: dict[str, jax.Array]) -> str:
    finite = fetch(metrics[f"{network}/finite"])
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


_NETWORKS = ("generator", "fake_score")


def scalars(metrics: dict[str, Any]) -> dict[str, float]:
  """The metrics that are single numbers, on the host."""
  single = {name: value for name, value in metrics.items() if np.ndim(value) == 0}
  return {name: float(value) for name, value in jax.device_get(single).items()}


def _names(tree: Any) -> list[str]:
  return [
    ".".join(str(part.key) for part in path)
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]
