"""The example blocks of README.md and docs/, and what it takes to run them as they stand.

A block runs in a folder that looks like a checkout, in the order of its page, with the files that
the page takes for granted. `python` there is `docs_python.py`, which appends smaller sizes to the
commands and changes nothing else; `pip` installs nothing.
"""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from rtdmd_jax.config import load_config
from tests.support.paths import ROOT

TINY = ROOT / "rtdmd_jax/assets/tiny"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_TPU = "needs libtpu and its compiler's minutes to hours"
_SAME = "README.md and tiny_pipeline.md run the same, but for the folder or one value"
_MEASURES = "measures for minutes to hours; its parts have tests of their own"
# Blocks that are not executed, and why; their command lines are checked all the same.
NOT_RUN = {
  "docs/aot.md": {
    "python -m rtdmd_jax.aot --config=configs/tiny_stage1.py --topology=v5e:2x2"
    " --json=report.json": _TPU,
    "python -m rtdmd_jax.aot --config=configs/tiny_stage2.py --topology=h100:2": (
      "needs jax's CUDA plugin; tests/aot/test_gpu.py runs it for another program"
    ),
  },
  "docs/backbones.md": {"PYTHONPATH=. python tests/support/offload_on_tpu.py": _TPU},
  "docs/data.md": {
    "git clone --depth=1 https://github.com/Harahan/RTDMD && mkdir -p prompts && cp -r"
    " RTDMD/dataset/pickscore prompts/": "needs the network; its command of Python is run below it",
  },
  "docs/evaluation.md": {
    "python -m rtdmd_jax.main --config=configs/sd35_stage1.py:scored --workdir=runs/sd35_stage1": (
      "needs checkpoints, prompts and services; tests/rehearsal runs it for SD3-M"
    ),
  },
  "docs/evidence.md": {
    "python -m benchmarks.tilt.run                  # or --only=gaussian, mixture, long, even,"
    " estimators": _MEASURES,
    "python -m benchmarks.tilt.run --only=bfloat16": _MEASURES,
    "python -m rtdmd_jax.main --config=configs/tiny_stage2.py --workdir=runs/average0"
    " --config.seed=0 --config.ema.decay=0.95    # and 1, 2": _SAME,
  },
  "docs/hardware.md": {
    "python -m benchmarks.aot_bounds configs/sd35_stage2.py v5e:2x4": _TPU,
    "python -m benchmarks.aot_bounds configs/sd35_stage2.py:1x80 h100:1": (
      "needs jax's CUDA plugin and minutes"
    ),
    "python -m rtdmd_jax.aot --config=configs/flux1_stage2.py --topology=v6e:8x8 \\": _TPU,
    "python -m rtdmd_jax.aot --config=configs/flux2_stage1.py --topology=v5e:2x4 \\": _TPU,
    "taskset -c 0 python -m benchmarks.steps --rounds=5 --compile": _MEASURES,
    "python -m benchmarks.loop_share configs/tiny_stage1.py configs/tiny_stage2.py --steps=10": (
      _MEASURES
    ),
    "python -m benchmarks.programs configs/tiny_stage1.py --devices 1 2 4 8 --images=32": _MEASURES,
    "python -m benchmarks.programs": "needs a GPU of 80 GB",
  },
  "docs/rewards_device.md": {"python -m benchmarks.rewards --size=small --images=1152": _MEASURES},
  "docs/robustness.md": {
    "for seed in 1 2 3 4; do python -m benchmarks.kills --kills=50 --seed=$seed; done": _MEASURES,
  },
  "docs/sharding.md": {
    "python -m rtdmd_jax.main --config=configs/flux2_stage2.py --workdir=runs/flux2_stage2 \\": (
      "needs two devices and checkpoints; tests/runtime/test_sharding.py has the devices"
    ),
  },
  "docs/index.md": {
    "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt": _SAME,
  },
  "docs/troubleshooting.md": {
    "python -m rtdmd_jax.main --config=configs/tiny_stage1.py --workdir=runs/stage1": _SAME,
    "python -m benchmarks.reference_curves runs/stage1 runs/stage2"
    " --out=docs/reference_curves.svg": "needs matplotlib",
  },
}

# What is appended to a command, by what it runs: keys of its configuration, or arguments.
_TRAINING = {
  "train.steps": 2,
  "train.log_every": 1,
  "train.save_every": 2,
  "train.profile_start": 1,
  "batch.prompts": 2,
  "batch.micro_batches": 1,
  "eval.every": 2,
  "eval.prompts": 2,
  "eval.final_prompts": 2,
  "eval.final_images": 1,
  "eval.chunk": 4,
  "eval.preview": 2,
  "eval.teacher_steps": 2,
}
_PHASES = ("vae", "text", "scorer", "teacher")
_SMALLER = {
  "stage1": _TRAINING | {"train.fake_update_ratio": 2},
  "stage2": _TRAINING | {"batch.images_per_prompt": 2},
  "pretrain": {
    "images": 12,
    **{f"{phase}.{key}": n for phase in _PHASES for key, n in (("steps", 2), ("batch_size", 4))},
  },
  "rtdmd_jax.evaluate": {"limit": 2, "batch": 2, "preview": 2},
}
_ARGUMENTS = {
  "benchmarks.prompt_memory": ["--steps=20"],
  "benchmarks.load_memory": ["--gigabytes=0.02"],
  "benchmarks.mistakes": [
    "--images=1", "--config.eval.chunk=4", "--config.eval.teacher_steps=2",
  ],
  "benchmarks.policy_variance": [
    "--batches=1", "--config.batch.prompts=2", "--config.batch.images_per_prompt=2",
    "--config.batch.micro_batches=1",
  ],
  "pytest": ["tests/test_launch.py"],
}  # fmt: skip
# Of the backbones that checkpoints are laid out for.
_REAL = {"model.image_size": 32}
_REAL_IMAGES = {"height": 32, "width": 32, "batch": 2}
GENEVAL_URL = "RTDMD_DOCS_GENEVAL"  # of the service that the test has started


def appended(argv: list[str]) -> list[str]:
  """What is appended to a command line of Python, so that it takes seconds."""
  name = argv[1] if argv[0] == "-m" else argv[0]
  if name in _ARGUMENTS:
    return _ARGUMENTS[name]
  spec = next((word for word in argv if word.startswith("--config=")), None)
  if spec is None:
    return []
  spec = spec.removeprefix("--config=")
  config, keys = load_config(spec), {}
  if name == "rtdmd_jax.main":
    keys = _SMALLER[config.stage] | ({} if "tiny" in spec else _REAL)
    if any(word.startswith("--config.train.profile_steps=") for word in argv):
      keys |= {"train.profile_steps": 1}
    if "geneval" in config.get("rewards", {}) and "url" in config.rewards.geneval:
      keys |= {"rewards.geneval.url": os.environ[GENEVAL_URL]}
    # The other services are up in tests/rehearsal; a page is read without them.
    watched = config.get("eval", {}).get("rewards", {})
    keys |= {f"eval.rewards.{name}": "none" for name in watched if "url" in watched[name]}
  elif name == "rtdmd_jax.sample" and "tiny" not in spec:
    keys = _REAL_IMAGES
  else:
    keys = _SMALLER.get(name, {})
  return [f"--config.{key}={value}" for key, value in keys.items()]


class Block(NamedTuple):
  """A fenced block: its page below the root, the line of its fence, its language and its text."""

  page: str
  line: int
  language: str
  text: str

  @property
  def key(self) -> tuple[str, str]:
    """Page and first line; no two blocks have the same."""
    return self.page, self.text.partition("\n")[0]

  @property
  def file(self) -> str | None:
    """The file that the block is, named by a comment in its first line."""
    named = re.match(r"# (\S+\.py)\n", self.text)
    return named[1] if named else None

  @property
  def fragment(self) -> bool:
    """Whether it is lines of a configuration."""
    return self.language == "python" and self.text.startswith("c.")


def collect() -> list[Block]:
  """Every fenced block of every page, in order."""
  found = []
  for page in PAGES:
    text = page.read_text()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
      line = text.count("\n", 0, match.start()) + 1
      found.append(Block(str(page.relative_to(ROOT)), line, match[1], match[2]))
  return found


def runs(block: Block) -> bool:
  """Whether a block is an example that tests execute."""
  listed = NOT_RUN.get(block.page, {})
  return bool(block.language) and not block.fragment and block.key[1] not in listed


def checkout(folder: Path, mode: str) -> Path:
  """A folder that looks like the root of a checkout, with its environment.

  Args:
    folder: gets all of it.
    mode: "run", or "record": then Python's command lines are kept in `commands` and not run.
  """
  for name in ("configs", "docs", "benchmarks", "launch", "tests"):
    skipped = shutil.ignore_patterns("__pycache__", "*.svg", "*.png")
    shutil.copytree(ROOT / name, folder / name, ignore=skipped)
  for name in ("README.md", "pyproject.toml", "requirements.txt", "requirements.lock"):
    shutil.copyfile(ROOT / name, folder / name)
  (folder / "rtdmd_jax").symlink_to(ROOT / "rtdmd_jax")
  tools = folder / ".venv/bin"
  tools.mkdir(parents=True)
  python = {
    "run": f'exec "{sys.executable}" "{ROOT / "tests/support/docs_python.py"}" "$@"',
    "record": f'printf "%s\\0" "$@" $\'\\n\' >> "{folder / "commands"}"',
  }[mode]
  for name in ("python", "python3"):
    _script(tools / name, f'[ "$1 $2" = "-m venv" ] && exit 0\n{python}')
  _script(
    tools / "pip", f'exec "{sys.executable}" "{ROOT / "tests/support/docs_python.py"}" pip "$@"'
  )
  return folder


def _script(path: Path, text: str) -> None:
  path.write_text(f"#!/usr/bin/env bash\n{text}\n")
  path.chmod(path.stat().st_mode | stat.S_IXUSR)


def take_for_granted(folder: Path) -> None:
  """Writes what pages say a user has: prompt files, and the results of other runs."""
  # Not above, since `docs_python.py` imports this module at each command.
  import numpy as np

  from rtdmd_jax import sample
  from rtdmd_jax.datasets.prompts import load_prompts

  prompts = TINY / "prompts"
  for name, source in (
    ("geneval_metadata.jsonl", "train_metadata.jsonl"),
    ("evaluation_metadata.jsonl", "test_metadata.jsonl"),
  ):
    shutil.copyfile(prompts / source, folder / name)
  lines = "a photo of a red circle\na photo of a blue cross\na photo of a green ring\n"
  for name in ("prompts.txt", "held_out.txt"):
    (folder / name).write_text(lines)
  for run in ("tiny", "tiny1"):
    for role in ("generator", "fake_score"):
      shutil.copytree(TINY / "stage1" / role, folder / "runs" / run / "export" / role)
  for number, prompt in enumerate(load_prompts(prompts, split="test", metadata=True)[:4]):
    how = {"steps": 4, "guidance": 1.0, "seed": 42, "prompt": prompt.text}
    image = np.full((64, 64, 3), 200, np.uint8)
    sample.write(image, folder / f"runs/earlier/images/result/{number:05d}_42.png", how)


def execute(block: Block, folder: Path, timeout: float = 600) -> str:
  """Runs a block in `folder`, or writes the file that it is; what it printed.

  Raises:
    AssertionError: it ended otherwise than with 0.
  """
  if block.file:
    path = folder / block.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text)
    return ""
  tools = folder / ".venv/bin"
  shell = ["bash", "-euo", "pipefail", "-c", block.text]
  command = [tools / "python", "-c", block.text] if block.language == "python" else shell
  environment = os.environ | {
    "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(folder),
  }
  done = subprocess.run(
    command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
  )
  assert done.returncode == 0, f"{block.page} line {block.line}\n{done.stdout}{done.stderr}"
  return done.stdout


def recorded(folder: Path) -> list[list[str]]:
  """Command lines of Python that blocks gave in a checkout of mode "record", and forgets them."""
  file = folder / "commands"
  text = file.read_text() if file.exists() else ""
  file.unlink(missing_ok=True)
  return [line.split("\0") for line in text.split("\0\n\0") if line]
