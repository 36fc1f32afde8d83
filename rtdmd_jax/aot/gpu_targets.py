"""GPUs as XLA's compiler wants them described, so that it works without one.

The values are those of openxla/xla, `xla/backends/gpu/target_config/specs`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuTarget:
  """One kind of GPU.

  Attributes:
    kind: jax's `device_kind`, by which `chips.CHIPS` knows its rates.
    memory: bytes of the card.
    bandwidth: of that memory (bytes/s).
    cores: streaming multiprocessors.
    fpus: float32 units of each.
    clock_ghz: of a multiprocessor.
    l2: bytes of the last cache.
    shared_memory: bytes of a multiprocessor, and the most that a block may ask for.
    capability: CUDA compute capability; 9 with the instructions of that architecture alone.
  """

  kind: str
  memory: int
  bandwidth: int
  cores: int
  fpus: int
  clock_ghz: float
  l2: int
  shared_memory: tuple[int, int]
  capability: int


CUDNN = 91000  # 9.10.0, as cuDNN writes its version
TARGETS = {
  "a100": GpuTarget(
    "NVIDIA A100-SXM4-80GB", 85_100_068_864, 2_039_040_000_000, 108, 64, 1.41, 41_943_040,
    (167_936, 166_912), 8,
  ),
  "h100": GpuTarget(
    "NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000, 132, 128, 1.98, 52_428_800,
    (233_472, 232_448), 9,
  ),
  "h200": GpuTarget(
    "NVIDIA H200", 151_397_597_184, 4_800_000_000_000, 132, 128, 1.98, 52_428_800,
    (233_472, 232_448), 9,
  ),
}  # fmt: skip


def target_config(target: GpuTarget) -> str:
  """The text of a `stream_executor.GpuTargetConfigProto`."""
  feature = "ACCELERATED_FEATURES" if target.capability >= 9 else "NONE"
  in_core, in_block = target.shared_memory
  return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {in_core}
  shared_memory_per_block_optin: {in_block}
  threads_per_core_limit: 2048
  core_count: {target.cores}
  fpus_per_core: {target.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {target.bandwidth}
  l2_cache_size: {target.l2}
  clock_rate_ghz: {target.clock_ghz}
  device_memory_size: {target.memory}
  cuda_compute_capability {{ major: {target.capability} feature_extension: {feature} }}
  driver_version: "13.0.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{target.kind}"
"""
