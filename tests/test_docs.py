"""What the pages say exists, and their example blocks run as they stand."""

import contextlib
import inspect
import json
import os
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest

from rtdmd_jax.config import flatten, load_config
from rtdmd_jax.rewards import device_rewards, host_rewards, make, multi
from tests.support.docs_blocks import (
  GENEVAL_URL,
  NOT_RUN,
  ROOT,
  checkout,
  collect,
  execute,
  recorded,
  runs,
  take_for_granted,
)

DOCS = ROOT / "docs"
BLOCKS = collect()
FRAGMENTS = [block for block in BLOCKS if block.fragment]

# Pages that are run in one folder, the one after the other.
TOGETHER = {"docs/troubleshooting.md": "README.md", "docs/index.md": "README.md"}


def _groups():
  """Pages to run in one folder, by the first of them."""
  found = {}
  for page in dict.fromkeys(block.page for block in BLOCKS if runs(block)):
    found.setdefault(TOGETHER.get(page, page), []).append(page)
  return found


def test_every_block_is_told_apart_and_the_list_is_of_blocks():
  keys = [block.key for block in BLOCKS]
  assert len(set(keys)) == len(keys)
  listed = {(page, line) for page, lines in NOT_RUN.items() for line in lines}
  assert listed <= {block.key for block in BLOCKS if block.language == "bash"}
  for block in BLOCKS:
    assert block.language in ("bash", "python", ""), block.key
    # What has no language is no example, but a drawing.
    assert block.language or "python " not in block.text, block.key


def test_every_command_line_is_understood(tmp_path):
  """Flags, keys and files of all blocks, those that are not run here included."""
  folder, commands = checkout(tmp_path / "checkout", "record"), []
  take_for_granted(folder)
  for tool in ("git", "curl", "hf", "cp"):
    (folder / ".venv/bin" / tool).symlink_to("/bin/true")
  for block in BLOCKS:
    if block.file or block.language == "bash":
      execute(block, folder)
      commands += recorded(folder)
  assert len(commands) > 60
  done = subprocess.run(
    [sys.executable, ROOT / "tests/support/docs_parse.py"],
    input=json.dumps(commands),
    cwd=folder,
    env=os.environ | {"PYTHONPATH": str(folder)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  wrong = json.loads(done.stdout.splitlines()[-1])
  assert not wrong, "\n".join(f"{' '.join(argv)}: {said}" for argv, said in wrong)


def _pages(pages, folder, monkeypatch):
  """Runs every block of pages that is to be run, in one folder."""
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
  run = [block for page in pages for block in BLOCKS if block.page == page and runs(block)]
  assert run
  for block in run:
    execute(block, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
  "first", [page for page in _groups() if page not in ("README.md", "docs/guides.md")]
)
def test_a_page_as_it_stands(first, tmp_path, monkeypatch):
  folder = checkout(tmp_path / "checkout", "run")
  take_for_granted(folder)
  _pages(_groups()[first], folder, monkeypatch)


@pytest.mark.slow
@pytest.mark.parity
def test_the_readme_as_it_stands(tmp_path, monkeypatch):
  pytest.importorskip("torch")
  pytest.importorskip("diffusers")
  layout = import_module("tests.rehearsal.layout")
  folder = checkout(tmp_path / "checkout", "run")
  take_for_granted(folder)
  layout.lay_out(folder, "sd35")
  (folder / "DIR").symlink_to("checkpoints/stable-diffusion-3.5-medium")
  with _geneval_service() as url:
    monkeypatch.setenv(GENEVAL_URL, url)
    readme, *others = _groups()["README.md"]
    _pages([readme], folder, monkeypatch)
    (folder / "DIR").unlink()  # there a pipeline, on the other pages a folder for a run
    _pages(others, folder, monkeypatch)
  for made in ("report.html", "export/generator/pytorch_lora_weights.safetensors"):
    assert (folder / "runs/tiny" / made).exists() and (folder / "runs/sd35_stage2" / made).exists()
  assert len(list((folder / "images").glob("00000_*.png"))) == 2
  assert (folder / "lora/comfyui_lora.safetensors").exists()


@contextlib.contextmanager
def _geneval_service():
  """The address of a reward service as the published configurations have one."""
  command = [sys.executable, "-m", "rtdmd_jax.rewards.serve", "--rewards=geneval", "--port=0"]
  command.append("--option=geneval.detector=shapes")
  process = subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
  )
  try:
    yield process.stdout.readline().split()[-1]
  finally:
    process.terminate()
    process.wait(30)


def _fragment(block):
  """The configuration that a fragment makes of stage 2's, and what it sets."""
  config = load_config(str(ROOT / "configs/tiny_stage2.py")).unlock()
  before = dict(flatten(config.to_dict()))
  exec(block.text, {"c": config})
  after = dict(flatten(config.to_dict()))
  return config, {key for key, value in after.items() if before.get(key, ()) != value}


@pytest.mark.parametrize("block", FRAGMENTS, ids=lambda block: f"{block.page}:{block.line}")
def test_lines_of_a_configuration(block, tmp_path, monkeypatch):
  """Every reward that they name takes the options that they give it."""
  config, changed = _fragment(block)
  assert changed
  for other in BLOCKS:  # what the page has put into a file
    if other.page == block.page and other.file:
      execute(other, tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  for section in (config.rewards, config.eval.rewards):
    for name, reward in section.items():
      options = {k: v for k, v in reward.items() if k not in multi.RUN_KEYS and k != "max_failed"}
      if name in device_rewards.NAMES:
        device_rewards.checked_options(name, options)
      elif name in host_rewards.FACTORIES:
        inspect.signature(host_rewards.FACTORIES[name]).bind(**options)
      else:
        scores = make({name: 1.0}, options={name: options})(_flat(1, 2), ["a", "b"])
        assert scores[name].shape == (2,) and np.isfinite(scores[name]).all()
      assert not getattr(reward, "backpropagate", False) or name in device_rewards.NAMES


def _flat(*levels):
  return np.stack([np.full((8, 8, 3), level, np.uint8) for level in levels])
