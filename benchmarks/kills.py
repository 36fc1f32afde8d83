"""Kills training with SIGKILL at random moments, resumes it, and compares where it ends.

python -m benchmarks.kills --kills=10 --seed=1

Of each stage a tiny run is made twice undisturbed. Then the same run is killed again and again: at
a moment drawn from the length of the second one, or, every second time, while a checkpoint is being
written. Started again with the same command it must go on from a complete checkpoint that is not
older than the last one seen, and every leaf of its last checkpoint (adapters, optimizer states,
moving average, step) must have the bits of the undisturbed run's. Prints a row for each stage;
exits with 1 if anything differs. Files stay in --workdir.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp

from benchmarks import record, tables

ROOT = Path(__file__).resolve().parents[1]
STEPS = 24
OVERRIDES = {
  "batch.prompts": 2,
  "batch.micro_batches": 1,
  "train.steps": STEPS,
  "train.save_every": 1,
  "train.keep": 2,
  "train.log_every": 1,
  "train.fake_update_ratio": 2,
  "eval.every": 1000,
  "eval.prompts": 2,
  "eval.final_prompts": 2,
  "eval.chunk": 2,
  "eval.preview": 2,
  "eval.teacher_steps": 2,
}
_STEP_LIMIT = 1200  # seconds; a run that takes longer hangs


class Kill(NamedTuple):
  """Where a kill struck: complete checkpoints there, and whether one was being written."""

  complete: list[int]
  saving: bool


def start(stage: int, workdir: Path, cache: Path) -> subprocess.Popen:
  """The run as a user starts it; compiled programs are shared between starts."""
  overrides = OVERRIDES | ({"batch.images_per_prompt": 2} if stage == 2 else {})
  command = [sys.executable, "-m", "rtdmd_jax.main", f"--workdir={workdir}"]
  command += [f"--config={ROOT / f'configs/tiny_stage{stage}.py'}"]
  command += [f"--config.{key}={value}" for key, value in overrides.items()]
  environment = os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  workdir.mkdir(parents=True, exist_ok=True)
  with open(workdir / "output.txt", "ab") as output:
    return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def finish(process: subprocess.Popen, workdir: Path) -> None:
  """Waits for the end of a run, which must be a good one."""
  code = process.wait(timeout=_STEP_LIMIT)
  if code != 0:
    tail = (workdir / "output.txt").read_text()[-3000:]
    raise RuntimeError(f"a start in {workdir} ended with {code}:\n{tail}")


def complete_steps(workdir: Path) -> list[int]:
  """Checkpoints under their final names."""
  return sorted(int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit())


def being_written(workdir: Path) -> bool:
  """Whether a checkpoint under a temporary name exists."""
  return any("tmp" in path.name for path in workdir.glob("checkpoints/*"))


def kill_at(
  process: subprocess.Popen, workdir: Path, delay: float, while_saving: bool
) -> Kill | None:
  """Kills after `delay` seconds, of the start or of the beginning of a save; None if it ended."""
  if while_saving:
    while process.poll() is None and not being_written(workdir):
      time.sleep(0.001)
  deadline = time.monotonic() + delay
  while process.poll() is None and time.monotonic() < deadline:
    time.sleep(0.001)
  process.send_signal(signal.SIGKILL)
  if process.wait() != -signal.SIGKILL:
    return None
  return Kill(complete_steps(workdir), being_written(workdir))


def leaves(workdir: Path) -> dict[str, np.ndarray]:
  """Every leaf of the last checkpoint by name."""
  return ocp.PyTreeCheckpointer().restore(workdir / f"checkpoints/{STEPS}/state")


def differing(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> list[str]:
  """Names of leaves that have not the same type, shape and bits."""
  names = sorted(one.keys() | two.keys())
  return [name for name in names if not _same(one.get(name), two.get(name))]


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
  if a is None or b is None:
    return False
  a, b = np.asarray(a), np.asarray(b)
  return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def sitting(stage: int, kills: int, draw: random.Random, workdir: Path) -> dict[str, int]:
  """All kills of a stage, counted, and how often something was not as it must be."""
  for name in ("whole", "again"):  # the second one finds its programs compiled, as all that follow
    began = time.monotonic()
    finish(start(stage, workdir / name, workdir / "cache"), workdir / name)
    length = time.monotonic() - began
  reference = leaves(workdir / "whole")
  wrong = [f"again: {name} differs" for name in differing(reference, leaves(workdir / "again"))]
  struck: list[Kill] = []
  laps = 0
  while len(struck) < kills or not laps:
    folder, last = workdir / f"lap{laps}", 0
    while len(struck) < kills:
      while_saving = len(struck) % 2 == 1
      delay = draw.random() * (0.3 if while_saving else length)
      kill = kill_at(start(stage, folder, workdir / "cache"), folder, delay, while_saving)
      if kill is None:
        break
      struck.append(kill)
      newest = max(kill.complete, default=0)
      print(f"stage {stage}, kill {len(struck)}: {kill}", file=sys.stderr, flush=True)
      if newest < last:
        wrong.append(f"lap {laps} had checkpoint {last} and then only {newest}")
      last = newest
    finish(start(stage, folder, workdir / "cache"), folder)
    wrong += [f"lap {laps}: {name} differs" for name in differing(reference, leaves(folder))]
    laps += 1
  for line in wrong:
    print(f"stage {stage}: {line}", file=sys.stderr, flush=True)
  saving = sum(kill.saving for kill in struck)
  early = sum(not kill.complete and not kill.saving for kill in struck)
  return {
    "stage": stage, "kills": len(struck), "early": early, "between": len(struck) - early - saving,
    "saving": saving, "laps": laps, "leaves": len(reference), "failures": len(wrong),
  }  # fmt: skip


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--kills", type=int, default=10, help="in all, shared by the stages")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--stages", type=int, nargs="+", default=[1, 2], choices=[1, 2])
  parser.add_argument("--workdir", type=Path, help="a new folder; a temporary one by default")
  record.add_flag(parser)
  options = parser.parse_args()
  workdir = options.workdir or Path(tempfile.mkdtemp(prefix="kills"))
  draw = random.Random(options.seed)
  rows = []
  for place, stage in enumerate(options.stages):
    share = (options.kills + place) // len(options.stages)
    row = sitting(stage, share, draw, workdir / f"stage{stage}")
    rows.append({"seed": options.seed} | row)
  tables.report("kills", rows, options.save, ("seed", "stage"))
  return int(any(row["failures"] for row in rows))


if __name__ == "__main__":
  sys.exit(main())
