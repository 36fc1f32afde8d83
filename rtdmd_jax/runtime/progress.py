"""Progress of a run: a live display on a terminal, plain lines elsewhere."""

import math
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any, Self, TextIO

import jax
import numpy as np
import psutil
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

_GIB = 2**30
# Metrics whose trend is shown.
_TRENDS = ("loss/", "reward/")


class Rate:
  """Steps, samples and TFLOP a second, averaged over the recent past."""

  def __init__(self, start_step: int, window: int = 50):
    """`window` is the number of updates averaged over."""
    self._window = window
    self._marks: list[tuple[float, int, int, float]] = []
    self._samples, self._tflop = 0, 0.0
    self._start_step = start_step

  def update(self, now: float, step: int, samples: int, tflop: float = 0.0) -> None:
    """Record that `step` finished at `now` (seconds) with so many more samples and TFLOP.

    The time before the first update is compilation and counts for nothing.
    """
    if step <= (self._marks[-1][1] if self._marks else self._start_step):
      raise ValueError(f"step {step} does not follow the last one")
    self._samples += samples
    self._tflop += tflop
    self._marks.append((now, step, self._samples, self._tflop))
    del self._marks[: -self._window - 1]

  def per_second(self) -> tuple[float, float, float] | None:
    """Steps, samples and TFLOP a second; None before the second update."""
    if len(self._marks) < 2:
      return None
    first, last = self._marks[0], self._marks[-1]
    seconds = max(last[0] - first[0], 1e-9)
    steps, samples, tflop = ((b - a) / seconds for a, b in zip(first[1:], last[1:], strict=True))
    return steps, samples, tflop


class Trend:
  """The direction of a noisy number: the later half of recent values against the earlier one."""

  def __init__(self, window: int = 40):
    """`window` is the number of values looked at."""
    self._values: deque[float] = deque(maxlen=window)

  def update(self, value: float) -> str:
    """The trend after one more value: rising, falling, steady, or empty before there are eight.

    A difference counts if it is more than two standard errors. Values that are not finite do not.
    """
    if math.isfinite(value):
      self._values.append(value)
    half = len(self._values) // 2
    if half < 4:
      return ""
    early, late = np.array(self._values)[-2 * half :].reshape(2, half)
    error = math.sqrt((early.var(ddof=1) + late.var(ddof=1)) / half)
    change = late.mean() - early.mean()
    if abs(change) <= 2 * error:
      return "steady"
    return "rising" if change > 0 else "falling"


class Progress:
  """Shows step, time left, throughput, current metrics, trends of losses and rewards, memory.

  On a terminal a bar and a table are redrawn in place; otherwise one line is printed every
  `every_seconds`, and for the first and last update.
  """

  def __init__(
    self,
    total_steps: int,
    *,
    start_step: int = 0,
    peak_tflops: float | None = None,
    recomputes: bool = False,
    every_seconds: float = 30.0,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Count from `start_step` to `total_steps`.

    Args:
      total_steps: last step.
      start_step: step before the first one.
      peak_tflops: what the devices could do in a second, for the share of it that is used.
      recomputes: that share includes rematerialisation: hardware, not model FLOPs utilization.
      every_seconds: between plain lines.
      stream: where to show, stdout by default.
      clock: in seconds.
    """
    self._peak, self._share = peak_tflops, "HFU" if recomputes else "MFU"
    self._total, self._every, self._clock = total_steps, every_seconds, clock
    self._stream = stream or sys.stdout
    self._rate = Rate(start_step)
    self._last_line: float | None = None
    self._trends: defaultdict[str, Trend] = defaultdict(Trend)
    self._live: Live | None = None
    if self._stream.isatty():
      self._bar = Bar(
        TextColumn("[bold]step"),
        MofNCompleteColumn(),
        BarColumn(None),
        TextColumn("{task.fields[eta]}"),
      )
      self._task = self._bar.add_task("", total=total_steps, completed=start_step, eta="compiling")
      console = Console(file=self._stream)
      self._live = Live(self._bar, console=console, refresh_per_second=4)

  def __enter__(self) -> Self:
    if self._live:
      self._live.start()
    return self

  def __exit__(self, *exception: object) -> None:
    if self._live:
      self._live.stop()

  def update(
    self, step: int, samples: int, metrics: Mapping[str, float], tflop: float = 0.0
  ) -> None:
    """Report a finished step.

    Args:
      step: its number, above the one reported before.
      samples: images made or seen since then, over all hosts.
      metrics: current losses, rewards and the like, as Python floats.
      tflop: computed since then, over all hosts, in 1e12 operations.
    """
    now = self._clock()
    self._rate.update(now, step, samples, tflop)
    rate = self._rate.per_second()
    left = "" if rate is None else f"{format_seconds((self._total - step) / rate[0])} left"
    facts = dict(memory())
    shown = {
      name: f"{value:.4g} {self._trends[name].update(value)}".rstrip()
      if name.startswith(_TRENDS)
      else f"{value:.4g}"
      for name, value in metrics.items()
    }
    if rate is not None:
      facts = self._rates(*rate) | facts
    if self._live:
      self._bar.update(self._task, completed=step, eta=left)
      self._live.update(Group(self._bar, _table(shown, facts)))
    elif self._last_line is None or step >= self._total or now - self._last_line >= self._every:
      self._last_line = now
      words = [f"step {step}/{self._total}", *([left] if left else [])]
      words += [f"{name} {value}" for name, value in (shown | facts).items()]
      print(" | ".join(words), file=self._stream, flush=True)

  def _rates(self, steps: float, samples: float, tflop: float) -> dict[str, str]:
    rates = {"steps/s": f"{steps:.3g}", "images/s": f"{samples:.4g}"}
    if tflop:
      rates["TFLOP/s"] = f"{tflop:.3g}"
    if tflop and self._peak:
      rates[self._share] = f"{tflop / self._peak:.1%}"
    return rates


def memory() -> dict[str, str]:
  """Resident memory of the process and, where the backend tells, of the first local device."""
  sizes = {"host memory": f"{psutil.Process().memory_info().rss / _GIB:.2f} GiB"}
  stats: dict[str, Any] = jax.local_devices()[0].memory_stats() or {}
  if "bytes_in_use" in stats:
    used = f"{stats['bytes_in_use'] / _GIB:.2f}"
    if "peak_bytes_in_use" in stats:
      used += f" (peak {stats['peak_bytes_in_use'] / _GIB:.2f})"
    if "bytes_limit" in stats:
      used += f" of {stats['bytes_limit'] / _GIB:.2f}"
    sizes["device memory"] = f"{used} GiB"
  return sizes


def format_seconds(seconds: float) -> str:
  """`seconds` as `1d 02h`, `3h 04m`, `5m 06s` or `7s`."""
  whole = max(round(seconds), 0)
  days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
  if days:
    return f"{days}d {hours:02d}h"
  if hours:
    return f"{hours}h {minutes:02d}m"
  return f"{minutes}m {whole % 60:02d}s" if minutes else f"{whole}s"


def _table(metrics: Mapping[str, str], facts: Mapping[str, str]) -> Table:
  """Two pairs of columns: metrics on the left, throughput and memory on the right."""
  left, right = list(metrics.items()), list(facts.items())
  table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
  for style in ("dim", "bold", "dim", ""):
    table.add_column(style=style)
  for row in range(max(len(left), len(right))):
    pairs = [side[row] if row < len(side) else ("", "") for side in (left, right)]
    table.add_row(*pairs[0], *pairs[1])
  return table
