"""The devices that a run would have: what they are, what must stay on them, how long it takes."""

import os
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from rtdmd_jax.aot.check.report import Report
from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime import sharding
from rtdmd_jax.runtime.chips import CHIPS
from rtdmd_jax.runtime.throughput import peak_tflops

# Share of the devices' peak that a run is taken to reach.
_SHARE = 0.4


def devices() -> list[str]:
  """A line about jax's devices: platform, kind, number and memory.

  Raises:
    UserError: the platform that was asked for is not there.
  """
  try:
    found = jax.devices()
  except RuntimeError as error:
    raise UserError(
      f"jax has no device ({str(error).splitlines()[0]}); see JAX_PLATFORMS and the installation."
    ) from error
  memory = device_memory()
  each = "this machine's memory" if _is_cpu() else "each"
  size = "memory unknown" if memory is None else f"{memory / 1e9:.1f} GB {each}"
  return [f"devices: {len(found)} x {found[0].device_kind} ({found[0].platform}), {size}"]


def device_memory() -> float | None:
  """Bytes of memory of one device; of a CPU the machine's; None if they are not known."""
  if _is_cpu():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  device = jax.local_devices()[0]
  limit = (device.memory_stats() or {}).get("bytes_limit")
  if limit is None and device.device_kind in CHIPS:
    return CHIPS[device.device_kind].hbm
  return limit


def memory(report: Report, trees: Mapping[str, Any], mesh: Mesh) -> list[str]:
  """The table of what stays on every device during a run; too much of it is a problem.

  On a CPU it is a warning: runs are also checked on machines that will not train them.
  """
  rows = sharding.table(trees, mesh)
  total, limit = sum(local for *_, local in rows), device_memory()
  parts = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  lines = [f"mesh: {parts}", f"{'on every device':34s}{'values in all':>18s}{'GB':>10s}"]
  lines += [f"  {name:32s}{count:18,}{local / 1e9:10.3f}" for name, count, _, local in rows]
  lines.append(f"  {'sum':50s}{total / 1e9:10.3f}")
  if limit is not None and _is_cpu() and total * jax.local_device_count() > limit:
    report.warning(
      f"{total * jax.local_device_count() / 1e9:.1f} GB must stay in the memory of this machine,"
      f" which has {limit / 1e9:.1f} GB: it cannot train this."
    )
  elif limit is not None and not _is_cpu() and total > limit:
    report.problem(
      f"{total / 1e9:.2f} GB must stay on every device, which has {limit / 1e9:.2f} GB; use more"
      " devices along mesh.fsdp."
    )
  return [*lines, "  activations come on top; rtdmd_jax.aot measures them for TPUs and GPUs"]


def time(config: Any, costs: Mapping[str, float]) -> str:
  """A line about the length of a run.

  Args:
    config: of the run.
    costs: operations of each program, all devices together.
  """
  turns = dict.fromkeys(costs, 1.0)
  if config.stage == "stage1":
    turns["generator"] = 1 / config.train.fake_update_ratio
  elif not config.policy.dmd_weight:  # nothing asks for the fake score
    turns["fake_score"] = 0.0
  step = sum(cost * turns[name] for name, cost in costs.items()) / 1e12
  size = f"{step:.3g}" if step < 100 else f"{step:,.0f}"
  text, peak = f"time: {size} TFLOP a step", peak_tflops()
  if peak is None:
    kind = jax.devices()[0].device_kind
    return f"{text}; the hours are not known, as the peak rate of {kind!r} is not"
  hours = step * config.train.steps / (peak * _SHARE) / 3600
  return (
    f"{text}; {hours:,.1f} hours for {config.train.steps:,} steps at {_SHARE:.0%} of the devices'"
    " peak, without evaluations and waiting for rewards of the host"
  )


def _is_cpu() -> bool:
  return jax.devices()[0].platform == "cpu"
