"""What programs need on absent TPUs or GPUs, without the compiler's last and longest part.

python -m benchmarks.aot_bounds configs/flux2_stage2.py v5e:8x8 batch.micro_batches=6
python -m benchmarks.aot_bounds configs/sd35_stage2.py:1x80 h100:1

`python -m rtdmd_jax.aot` compiles to the end, minutes a program. All that it reports but the size
of the code is known before code is generated: here a process of its own compiles each program,
and is stopped as soon as the compiler has written its text and its memory.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import record, tables
from benchmarks.selections import BACKBONES

PROGRAMS = {"stage1": ("fake_score", "generator"), "stage2": ("rollout", "fake_score", "policy")}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("config", help="of stage 1 or 2")
  parser.add_argument("topology", help="such as v5e:8x8 or h100:8")
  parser.add_argument("overrides", nargs="*", help="key=value of the config")
  parser.add_argument("--only", help="one program")
  record.add_flag(parser)
  options = parser.parse_intermixed_args()
  from rtdmd_jax.config import load_config
  from rtdmd_jax.errors import UserError

  try:
    stage = load_config(options.config, options.overrides).get("stage")
  except UserError as error:
    parser.error(str(error))
  if stage not in PROGRAMS:
    parser.error(f"stage is {stage!r}; use one of {', '.join(PROGRAMS)}.")
  if options.only and options.only not in PROGRAMS[stage]:
    parser.error(f"--only is {options.only!r}; the programs are {', '.join(PROGRAMS[stage])}.")
  family, rows = Path(options.config.partition(":")[0]).stem.rpartition("_")[0], []
  place = {
    "backbone": BACKBONES.get(family, family), "stage": int(stage[-1]), "slice": options.topology,
    "command": record.command_line().replace(" --save", ""),
  }  # fmt: skip
  if setup := options.config.partition(":")[2]:
    place["setting"] = setup
  for name in (options.only,) if options.only else PROGRAMS[stage]:
    begin = time.perf_counter()
    row = measure(options.config, options.overrides, options.topology, name)
    rows.append(place | {"program": name} | row)
    print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
  keys = ("backbone", "stage", "slice", "setting", "program")
  table = "gpu_bounds" if "launches" in rows[0] else "hardware_bounds"
  tables.report(table, rows, options.save, keys)


def measure(config: str, overrides: list[str], topology: str, name: str) -> dict[str, Any]:
  """What one program needs of a device."""
  from rtdmd_jax.aot.hlo import traffic
  from rtdmd_jax.runtime import chips

  with tempfile.TemporaryDirectory() as folder:
    args = (config, overrides, topology, name, folder)
    child = multiprocessing.get_context("spawn").Process(target=compile_into, args=args)
    child.start()
    written = wait_for(Path(folder), child)
    child.kill()
    child.join()
    if written is None:
      sys.exit(f"the compiler wrote nothing of {name}; what it said stands above.")
    text, allocations = written
    known = json.loads((Path(folder) / "traced.json").read_text())
  moved, chip = traffic(text, known["turns"]), chips.chip(known["kind"])
  launches = {"launches": sum(moved.kernels.values())} if known["gpu"] else {}
  sent = sum(moved.sent.values())
  times = chips.roofline(chip, known["flops"], moved.memory, sent)
  used = allocated(allocations) + known["resident"]
  slowest = max(("compute", "memory", "network"), key=times.get)
  return {
    "tflop": known["flops"] / 1e12, "traffic_tb": moved.memory / 1e12, "sent_gb": sent / 1e9,
    "peak_gib": used / 2**30, "limit_gib": known["available"] / 2**30, "bound_s": times["seconds"],
    "bound_by": slowest.replace("compute", "arithmetic"), "mfu_bound": times["mfu_bound"],
    **launches,
  }  # fmt: skip


def allocated(text: str) -> int:
  """Bytes that a dump of allocations has in the device's memory, the program's code left out."""
  found = re.findall(r"^allocation \d+: (?:0x\w+, )?size (\d+)(.*)$", text, re.MULTILINE)
  # A color is another memory; "thread-local" are the operands inside of fusions.
  return sum(int(n) for n, rest in found if not re.search(r"color [1-9]|thread-local", rest))


@contextmanager
def traced(config: str, overrides: list[str], topology: str, name: str):
  """A traced program and where it runs, a mesh that is set meanwhile."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  import jax
  from jax.sharding import NamedSharding, PartitionSpec

  from rtdmd_jax.aot import compile as aot
  from rtdmd_jax.aot.abstract import abstract_setup
  from rtdmd_jax.aot.topology import find_topology
  from rtdmd_jax.config import load_config
  from rtdmd_jax.runtime import sharding

  config = load_config(config, overrides)
  setup = abstract_setup(config)
  there = find_topology(topology)
  there.check(config)
  mesh = sharding.make_mesh(**config.mesh, devices=there.devices)
  images = config.batch.prompts * config.batch.images_per_prompt

  def place(shape):
    axes = [sharding.BATCH_AXES if size == images else None for size in shape.shape]
    where = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

  with jax.set_mesh(mesh):
    run = aot.abstract_run(config, setup, mesh)
    if name in ("fake_score", "policy") and config.stage == "stage2":
      # The rollout leaves every image where it was made.
      run.known.update(aot.samples(run, lambda shapes: jax.tree.map(place, shapes)))
    yield aot.trace(run, name), there


def compile_into(config: str, overrides: list[str], topology: str, name: str, folder: str) -> None:
  """Traces and compiles one program; the compiler writes its texts into `folder`."""
  with traced(config, overrides, topology, name) as (program, there):
    known = {"flops": program.flops, "resident": program.resident, "turns": program.turns}
    known |= {"kind": there.kind, "available": there.available, "gpu": there.gpu}
    (Path(folder) / "traced.json").write_text(json.dumps(known))
    dumps = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    program.lowered.compile({**there.options, **dumps})


def wait_for(folder: Path, child) -> tuple[str, str] | None:
  """The program's text and allocations, when both are there; None if the compiler ends before."""
  before = -1
  while True:
    ended = not child.is_alive()
    texts = [*folder.glob("*after_optimizations.txt")]
    allocations = [*folder.glob("*after_optimizations-buffer-assignment.txt")]
    if texts and allocations and any(folder.glob("*memory-usage-report.txt")):
      files = [max(found, key=lambda f: f.stat().st_size) for found in (texts, allocations)]
      size = sum(file.stat().st_size for file in files)
      if ended or size == before:
        return tuple(file.read_text() for file in files)
      before = size
    elif ended:
      return None
    time.sleep(3)


if __name__ == "__main__":
  main()
