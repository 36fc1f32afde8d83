"""Compiles one program for an absent TPU with several of libtpu's options, one after another.

  python -m benchmarks.compiler_options configs/flux1_stage1.py v6e:8x8 generator \
    batch.prompts=256 batch.micro_batches=1 --options xla_tpu_scoped_vmem_limit_kib=16384

The first row is without any. Products are fused operations with a matrix product or a convolution;
libtpu generates code for those that differ in anything but names. Cycles are what it expects of the
fused operations, loops multiplied out: kernels and collectives are not in them, and no TPU has
confirmed them. With --blocks=2 the transformer has two blocks of each kind: what that saves, more
scanning could save.
"""

import argparse
import re
import time

import jax

from benchmarks.aot_bounds import digits, traced
from rtdmd_jax.aot.compile import compile_to_text
from rtdmd_jax.aot.hlo import parse, traffic
from rtdmd_jax.weights.published import PUBLISHED

HEAD = (
  "options", "s", "of processors", "code MB", "products", "different", "temporaries GiB",
  "traffic TB", "Gcycles",
)  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("config", help="of stage 1 or 2")
  parser.add_argument("topology", help="of TPUs, such as v6e:8x8")
  parser.add_argument("program", help="of a training step, such as policy")
  parser.add_argument("overrides", nargs="*", help="key=value of the config")
  parser.add_argument("--options", nargs="*", default=[], help="name=value[,name=value ...] a row")
  parser.add_argument("--blocks", type=int, help="of each kind in place of the published number")
  args = parser.parse_intermixed_args()
  if args.blocks:
    shorten(args.blocks)
  print("|", " | ".join(HEAD), "|\n" + "|---" * len(HEAD) + "|", flush=True)
  for options in ("", *args.options):
    with traced(args.config, args.overrides, args.topology, args.program) as (program, _):
      cells = measure(program, dict(pair.split("=") for pair in options.split(",") if pair))
    jax.clear_caches()
    print("|", " | ".join((f"`{options}`" if options else "none", *cells)), "|", flush=True)


def shorten(blocks: int) -> None:
  """Gives every published transformer `blocks` blocks of each kind; of SD3's last there is one."""
  for files in PUBLISHED.values():
    if "transformer" not in files:
      continue
    known = files["transformer"]
    if "Flux" in files[""]["_class_name"]:
      depth = {"num_layers": blocks, "num_single_layers": blocks}
    elif "dual_attention_layers" in known:
      depth = {"num_layers": 2 * blocks + 1, "dual_attention_layers": tuple(range(blocks))}
    else:
      depth = {"num_layers": blocks + 1}
    files["transformer"] = known | depth


def measure(program, options: dict[str, str]) -> tuple[str, ...]:
  """A row's cells but the first."""
  wall, processor = time.perf_counter(), time.process_time()
  compiled, text = compile_to_text(program.lowered, options)
  wall, processor = time.perf_counter() - wall, time.process_time() - processor
  sizes = compiled.memory_analysis()
  moved, found = traffic(text, program.turns), products(text)
  return (
    f"{wall:.0f}", f"{processor:.0f}", f"{sizes.generated_code_size_in_bytes / 1e6:.0f}",
    str(len(found)), str(len(set(found))), f"{sizes.temp_size_in_bytes / 2**30:.2f}",
    digits(moved.memory / 1e12), digits(moved.cycles / 1e9),
  )  # fmt: skip


def products(text: str) -> list[str]:
  """Every fused operation with a product, its names by number and without what it was made of."""
  computations, _ = parse(text)
  fused = set(re.findall(r" fusion\(.*calls=%?([\w.\-]+)", text))

  def described(instruction, numbers: dict[str, str]) -> str:
    line = f"%{instruction.name} = {instruction.text}"
    line = re.sub(r", (metadata|backend_config)=.*", "", line)
    inner = computations.get((re.findall(r"calls=%?([\w.\-]+)", line) or [""])[0])
    line = re.sub(r"calls=%?[\w.\-]+", "", line)
    line = re.sub(r"%[\w.\-]+", lambda m: numbers.setdefault(m[0], f"%{len(numbers)}"), line)
    return line + "\n" + (body(inner) if inner else "")

  def body(computation) -> str:
    numbers = {}
    return "".join(described(part, numbers) for part in computation.instructions.values())

  outside = (c for name, c in computations.items() if name not in fused)
  operations = (i for c in outside for i in c.instructions.values() if i.opcode == "fusion")
  said = (described(i, {}) for i in operations)
  return [one for one in said if re.search(r" (convolution|dot)\(", one)]


if __name__ == "__main__":
  main()
