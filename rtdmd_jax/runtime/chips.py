"""The limits of a device: peak arithmetic, memory and links."""

from typing import NamedTuple

from rtdmd_jax.errors import UserError


class Chip(NamedTuple):
  """One device as jax sees it.

  `flops` is its dense bfloat16 peak (1/s), `hbm` its memory (bytes), `bandwidth` that memory's
  speed (bytes/s) and `link` what it can send over all its links at once (bytes/s).
  """

  name: str
  flops: float
  hbm: float
  bandwidth: float
  link: float


_GIB = 2**30
# By `device_kind`. Rates: the page of each version at cloud.google.com/tpu/docs; the pages give
# links in both directions together, of which half counts here. Memory: what libtpu 0.0.52 says is
# available when a program does not fit. A v4 or TPU7x chip is two devices here. GPUs: NVIDIA's data
# sheets, dense rates; of NVLink, half counts, too; memory as CUDA reports the card's.
CHIPS = {
  "TPU v4": Chip("v4", 275e12 / 2, 15.25 * _GIB, 1200e9 / 2, 300e9 / 2),
  "TPU v5 lite": Chip("v5e", 197e12, 15.75 * _GIB, 819e9, 200e9),
  "TPU v5": Chip("v5p", 459e12, 95.73 * _GIB, 2765e9, 600e9),
  "TPU v6 lite": Chip("v6e", 918e12, 31.24 * _GIB, 1600e9, 400e9),
  "TPU7x": Chip("tpu7x", 2307e12 / 2, 94.74 * _GIB, 7380e9 / 2, 600e9 / 2),
  "NVIDIA A100-SXM4-40GB": Chip("a100-40", 312e12, 42.3e9, 1555e9, 300e9),
  "NVIDIA A100-SXM4-80GB": Chip("a100-80", 312e12, 85.1e9, 2039e9, 300e9),
  "NVIDIA H100 80GB HBM3": Chip("h100", 989e12, 84.9e9, 3350e9, 450e9),
  "NVIDIA H200": Chip("h200", 989e12, 151.4e9, 4800e9, 450e9),
}


def chip(device_kind: str) -> Chip:
  """The table's entry.

  Raises:
    UserError: a kind of device that the table lacks.
  """
  if device_kind not in CHIPS:
    raise UserError(f"no peak rates are known of {device_kind!r}; known are {', '.join(CHIPS)}.")
  return CHIPS[device_kind]


def roofline(chip: Chip, flops: float, memory: float, network: float) -> dict[str, float]:
  """Lower bound of a program's time in seconds, if everything overlaps perfectly.

  Args:
    chip: of each device.
    flops: floating-point operations of one device.
    memory: bytes to and from its memory.
    network: bytes that it sends to others.

  Returns:
    `compute`, `memory` and `network` (seconds each), `seconds` (the largest), and `mfu_bound` (the
    part of peak arithmetic that remains possible, in [0, 1]).
  """
  times = {
    "compute": flops / chip.flops,
    "memory": memory / chip.bandwidth,
    "network": network / chip.link,
  }
  seconds = max(times.values())
  return times | {"seconds": seconds, "mfu_bound": times["compute"] / seconds if seconds else 0.0}
