"""The arithmetic of a run and of its devices, for the rates that are displayed."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from rtdmd_jax.runtime.chips import CHIPS
from rtdmd_jax.runtime.flops import count_flops


def loop_turns(program: str, steps: int) -> tuple[float, int]:
  """Mean and most turns of the loop in a stage-1 program whose rollout stops at random.

  The stop is uniform over 1 to `steps`; the generator's last step, which it differentiates, lies
  outside of its loop.
  """
  outside = program == "generator"
  return (steps + 1) / 2 - outside, steps - outside


class Meter:
  """Adds up the arithmetic of compiled programs as they are called.

  `tflop` is what was called so far, over all devices: matrix products and convolutions, in 1e12
  operations. What rematerialisation computes again counts, and so do micro-batches without signal
  that a step leaves out.
  """

  def __init__(self, steps: int):
    """`steps` of a rollout that does not stop early."""
    self._steps = steps
    self.tflop = 0.0

  def watch(self, programs: Mapping[str, Callable]) -> dict[str, Callable]:
    """The same programs, counted; each is traced once, which its first call then need not."""
    return {name: self._watched(name, program) for name, program in programs.items()}

  def _watched(self, name: str, program: Any) -> Callable:
    cost: float | None = None
    turns, _ = loop_turns(name, self._steps)

    def run(*args: Any) -> Any:
      nonlocal cost
      if cost is None:
        cost = count_flops(program.trace(*args).jaxpr, turns) / 1e12
      self.tflop += cost
      return program(*args)

    return run


def peak_tflops() -> float | None:
  """Dense bfloat16 peak of all devices together, in 1e12 operations a second, if known."""
  device = jax.devices()[0]
  if device.device_kind not in CHIPS:
    return None
  return CHIPS[device.device_kind].flops * jax.device_count() / 1e12
