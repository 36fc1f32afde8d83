"""Compiles a run for devices that are not there: `python -m rtdmd_jax.aot --topology=v5e:8x8 ...`.

TPUs need libtpu, GPUs (--topology=h100:8) jax's CUDA plugin; neither needs a device or a driver.

Prints what every program of a training step costs one device: memory against what the device has,
floating-point operations, traffic, and the least time that its peak rates allow. Reads config files
alone: checkpoints that are missing are described by their published configs. Writes the file of
--json. Exit code 0: everything fits;
1: something does not; 2: nothing was found out,
because of a mistake on the command line or in the config, or because the compiler itself failed.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import flags

from rtdmd_jax import cli
from rtdmd_jax.aot.silence import without_stderr
from rtdmd_jax.errors import UserError

DOES_NOT_FIT = 1


def define_flags(values: flags.FlagValues) -> None:
  """The tool's own flags."""
  flags.DEFINE_string(
    "topology", None, "TPU slice or GPUs, such as v5e:8x8, h100:8 or h100:1x2x8.", values
  )
  flags.DEFINE_string("json", None, "Also write the report to this file.", values)
  flags.DEFINE_string("only", "", "Compile this program alone.", values)


def main(call: cli.Invocation) -> None:
  """Exits with `DOES_NOT_FIT` if a program does not fit."""
  call.expect("training")
  out = None if call.flags.json is None else Path(call.flags.json)
  if out is not None:
    _check_writable(out)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")  # jax would look for a device
  with without_stderr():
    import jax
  from rtdmd_jax.aot.compile import measure

  jax.config.update("jax_disable_most_optimizations", False)
  report = measure(call.config, call.flags.topology, call.flags.only, done=_announce)
  print("\n".join(lines(report)))
  if out is not None:
    out.write_text(json.dumps(report, indent=2))
  if not report["fits"]:
    sys.exit(DOES_NOT_FIT)


def _check_writable(file: Path) -> None:
  """Before minutes of work; leaves what is there, or is not, as it is."""
  there = file.exists()
  try:
    file.open("a").close()
  except OSError as error:
    raise UserError(f"--json is {file}, which cannot be written ({error.strerror}).") from error
  if not there:
    file.unlink()


def _announce(cost: Any) -> None:
  """Says on standard error what is known so far: the next program may take minutes, or fail."""
  size = cost.reason or f"peak {cost.peak / 1e9:.3f} GB"
  print(
    f"{cost.name}: {size}, compiled in {cost.compile_seconds:.0f} s", file=sys.stderr, flush=True
  )


def lines(report: dict[str, Any]) -> list[str]:
  """The report as text."""
  size = 1
  for axis in report["mesh"].values():
    size *= axis
  mesh = " x ".join(f"{axis} {n}" for axis, n in report["mesh"].items())
  out = [
    f"{report['stage']} on {report['topology']}: {size} devices ({mesh}), a batch of"
    f" {report['batch']}; {report['available'] / 1e9:.2f} GB each",
    *report["notes"],
    "",
    f"{'on every device':28s}{'parameters':>16s}{'GB':>10s}",
  ]
  for row in report["placement"]:
    count = f"{row['parameters']:,}" if "parameters" in row else ""
    out.append(f"{row['name']:28s}{count:>16s}{row['local'] / 1e9:10.3f}")
  for program in report["programs"]:
    out += ["", *_program(program, report["available"])]
  out += ["", "everything fits" if report["fits"] else "DOES NOT FIT"]
  return out


def _program(p: dict[str, Any], available: float) -> list[str]:
  head = f"{p['name']}: compiled in {p['compile_seconds']:.0f} s, {p['flops'] / 1e12:.3f} TFLOP"
  if p["reason"]:
    return [head, f"  does not fit: {p['reason']}"]
  gb = {k: p[k] / 1e9 for k in ("arguments", "outputs", "temporaries", "code", "resident", "peak")}
  parts = ", ".join(f"{name} {value:.3f}" for name, value in gb.items() if name != "peak")
  share = p["peak"] / available
  memory = f"  peak {gb['peak']:.3f} GB, {share:.0%} of memory ({parts})"
  times = p["times"]
  bounds = ", ".join(f"{k} {1e3 * times[k]:.2f}" for k in ("compute", "memory", "network"))
  out = [
    head,
    memory,
    f"  memory traffic {p['memory'] / 1e9:.2f} GB",
    f"  at least {1e3 * times['seconds']:.2f} ms ({bounds}); MFU at most {times['mfu_bound']:.0%}",
  ]
  if p["kernels"]:
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(p["kernels"].items()))
    out.append(f"  {sum(p['kernels'].values()):,} kernels launched: {kinds}")
  for kind, sent in sorted(p["sent"].items()):
    out.append(f"  {kind}: {p['collectives'][kind]}, {sent / 1e9:.3f} GB sent")
  if p["unknown_loops"]:
    out.append(f"  {p['unknown_loops']} loops of unknown length are counted at a rollout's longest")
  return out


if __name__ == "__main__":
  sys.exit(
    cli.run(main, define_flags=define_flags, requires=("config", "topology"), shared=("config",))
  )
