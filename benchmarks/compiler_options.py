"""Compiles one program for an absent TPU with several of libtpu's options, one after another.

  python benchmarks/compiler_options.py configs/flux1_stage1.py v6e:8x8 generator \
    batch.prompts=256 batch.micro_batches=1 --options xla_tpu_scoped_vmem_limit_kib=16384

The first row is without any. Cycles are what libtpu itself expects of the fused operations, loops
multiplied out: kernels and collectives are not in them, and no TPU has confirmed them.
"""

import argparse
import time

import jax
from aot_bounds import digits, traced

from rtdmd_jax.aot.hlo import traffic

HEAD = "options", "s", "of processors", "code MB", "temporaries GiB", "traffic TB", "Gcycles"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("config", help="of stage 1 or 2")
  parser.add_argument("topology", help="of TPUs, such as v6e:8x8")
  parser.add_argument("program", help="of a training step, such as policy")
  parser.add_argument("overrides", nargs="*", help="key=value of the config")
  parser.add_argument("--options", nargs="*", default=[], help="name=value[,name=value ...] a row")
  args = parser.parse_intermixed_args()
  print("|", " | ".join(HEAD), "|\n" + "|---" * len(HEAD) + "|", flush=True)
  for options in ("", *args.options):
    with traced(args.config, args.overrides, args.topology, args.program) as (program, _):
      cells = measure(program, dict(pair.split("=") for pair in options.split(",") if pair))
    jax.clear_caches()
    print("|", " | ".join((f"`{options}`" if options else "none", *cells)), "|", flush=True)


def measure(program, options: dict[str, str]) -> tuple[str, ...]:
  """A row's cells but the first."""
  wall, processor = time.perf_counter(), time.process_time()
  compiled = program.lowered.compile(options)
  wall, processor = time.perf_counter() - wall, time.process_time() - processor
  sizes, moved = compiled.memory_analysis(), traffic(compiled.as_text(), program.turns)
  return (
    f"{wall:.0f}", f"{processor:.0f}", f"{sizes.generated_code_size_in_bytes / 1e6:.0f}",
    f"{sizes.temp_size_in_bytes / 2**30:.2f}", digits(moved.memory / 1e12),
    digits(moved.cycles / 1e9),
  )  # fmt: skip


if __name__ == "__main__":
  main()
