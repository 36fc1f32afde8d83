"""Absent devices to compile for: TPUs through libtpu, GPUs through jax's CUDA plugin."""

import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.experimental import topologies

from rtdmd_jax.aot.gpu_targets import CUDNN, TARGETS, target_config
from rtdmd_jax.aot.silence import without_stderr
from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime import gpu_memory
from rtdmd_jax.runtime.chips import Chip, chip
from rtdmd_jax.runtime.extras import missing

# libtpu would look for a TPU machine's metadata, and lock out whoever compiles at the same time.
_LIBTPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Without a device nothing is tuned, and the first tiles that Triton is given do not fit some
# products: all of them go to cuBLAS.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
_GPU_UNKNOWN = (
  "not known without a GPU: which kernels its autotuning would take for products (all are cuBLAS's"
  " here), the workspaces of cuDNN's attention, NCCL's buffers, the CUDA"
  " context, fragmentation"
)


class Topology(NamedTuple):
  """Devices that are not there.

  Attributes:
    name: as it was asked for.
    kind: of device, a key of `chips.CHIPS`.
    devices: to compile for.
    available: bytes that programs may have on one device.
    options: of the compiler.
    gpu: whether they are GPUs.
    notes: sentences on what the compiler's numbers mean and leave out.
  """

  name: str
  kind: str
  devices: list[Any]
  available: float
  options: Mapping[str, Any] = {}
  gpu: bool = False
  notes: tuple[str, ...] = ()

  @property
  def chip(self) -> Chip:
    """The rates of each device."""
    return chip(self.kind)

  def check(self, config: Any) -> None:
    """Refuses a run whose memory the compiler would not tell.

    Raises:
      UserError: offloaded kernels on GPUs.
    """
    if self.gpu and config.model.offload:
      raise UserError(
        "model.offload is True; GPUs' compiler without a GPU leaves out where arrays lie, so what"
        " an offloaded run takes is not known. Compile with --config.model.offload=False."
      )


def find_topology(name: str) -> Topology:
  """The devices of "v5e:8x8" (libtpu), or "h100:8" and "h100:1x2x8" (jax's CUDA plugin).

  GPUs are given by their number on one host, or by partitions x hosts x GPUs of a host.

  Raises:
    UserError: the plugin is missing, or knows no such topology.
  """
  kind, _, shape = name.partition(":")
  if kind in TARGETS:
    return _gpus(name, kind, shape)
  for variable, value in _LIBTPU.items():
    os.environ.setdefault(variable, value)
  try:
    devices = list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
  except (RuntimeError, NotImplementedError, ValueError) as error:
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
      absent = ModuleNotFoundError("it compiles for TPUs that are not there", name="libtpu")
      raise missing(f"--topology={name}", absent, "tpu") from error
    raise UserError(
      f"--topology is {name!r}: {_first_line(error)} (examples: v5e:8x8, v5p:2x2x2, v6e:4x4,"
      f" {', '.join(f'{gpu}:8' for gpu in TARGETS)})."
    ) from error
  kind = devices[0].device_kind
  return Topology(name, kind, devices, chip(kind).hbm)


def _gpus(name: str, kind: str, shape: str) -> Topology:
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*x[1-9]\d*)?", shape):
    raise UserError(
      f"--topology is {name!r}; of GPUs give the number on one host, such as {kind}:8, or"
      f" partitions x hosts x GPUs of a host, such as {kind}:1x2x8."
    )
  target, counts = TARGETS[kind], shape if "x" in shape else f"1x1x{shape}"
  try:
    with without_stderr():
      found = topologies.get_topology_desc(
        platform="cuda", topology=counts, target_config=target_config(target)
      )
  except NotImplementedError as error:
    absent = ModuleNotFoundError(
      "it compiles for GPUs that are not there", name="jax's CUDA plugin"
    )
    raise missing(f"--topology={name}", absent, "gpu-aot") from error
  except (RuntimeError, ValueError) as error:
    raise UserError(f"--topology is {name!r}: {_first_line(error)}.") from error
  _describe_cudnn()
  part = gpu_memory.fraction()
  pool = f"a run's pool is {part:.0%} of the card ({gpu_memory.VARIABLE})"
  return Topology(
    name=name,
    kind=target.kind,
    devices=list(found.devices),
    available=part * target.memory,
    options=_GPU_OPTIONS,
    gpu=True,
    notes=(pool, _GPU_UNKNOWN),
  )


def _describe_cudnn() -> None:
  """Tells jax the version of cuDNN that the target has, if the library is not installed.

  jax asks for it when it lowers an attention; the compiler itself has it from the description.
  """
  from jax._src.cudnn import fused_attention_stablehlo

  try:
    fused_attention_stablehlo.check_cudnn_version()
  except RuntimeError:
    fused_attention_stablehlo.check_cudnn_version = lambda: CUDNN


def _first_line(error: Exception) -> str:
  return str(error).splitlines()[0]
