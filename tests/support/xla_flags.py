"""XLA's flags in tests, where programs run for moments and their compilation is what takes time."""

# Beside JAX_DISABLE_MOST_OPTIMIZATIONS: the older emitter of fusions makes a third of the code, and
# one module for LLVM suits tests that keep every core busy already.
_QUICK = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")


def xla_flags(devices: int | str | None = None) -> str:
  """The value of XLA_FLAGS for a process with so many simulated devices."""
  count = () if devices is None else (f"--xla_force_host_platform_device_count={devices}",)
  return " ".join((*count, *_QUICK))
