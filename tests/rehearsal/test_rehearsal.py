"""Every published file of `configs/` is run as it ships, with sizes alone made smaller.

Each family goes the whole way of a user: --check, stage 1, stage 2 on its export, sample,
evaluate, export in each format, and diffusers loads the result. Checkpoints, prompts and reward
services lie where the configs look for them (`layout.py`, `services.py`).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("rapidocr")
from tests.rehearsal import layout, services  # noqa: E402  after torch is known to be there
from tests.support import docs_blocks  # noqa: E402
from tests.support.paths import ROOT  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

FAMILIES = ("sd3", "sd35", "flux1", "flux2", "flux2_9b")
KINDS = ("stage1", "stage2", "infer", "eval")
LIBRARIES = ("common", "families", "gpus")  # what configs share; no configs themselves
STEPS = 10  # stage 1 updates the generator in every tenth, stage 2's moving average in each eighth
# Sizes: steps, images, pixels, prompts scored.
TRAIN = {
  "model.image_size": 64, "batch.prompts": 2, "batch.micro_batches": 1, "train.steps": STEPS,
  "train.log_every": 4, "train.save_every": 5, "eval.every": 8, "eval.prompts": 2,
  "eval.final_prompts": 3, "eval.chunk": 2, "eval.preview": 2, "eval.teacher_steps": 2,
}  # fmt: skip
STAGE2 = TRAIN | {"batch.images_per_prompt": 2, "batch.micro_batches": 2}
INFER = {"height": 64, "width": 64, "batch": 2}
EVAL = INFER | {"limit": 2, "preview": 2}
PIPELINES = {
  "sd3": "StableDiffusion3Pipeline", "sd35": "StableDiffusion3Pipeline", "flux1": "FluxPipeline",
  "flux2": "Flux2KleinPipeline", "flux2_9b": "Flux2KleinPipeline",
}  # fmt: skip


class User:
  """Types commands in a folder that has `configs/`."""

  def __init__(self, folder, cache):
    self.folder = folder
    self._times = []
    shutil.copytree(ROOT / "configs", folder / "configs")
    self._environment = os.environ | {
      "PYTHONPATH": str(ROOT),
      "JAX_PLATFORMS": "cpu",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache)),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "HF_HUB_OFFLINE": "1",
    }

  def run(self, module, *flags, sizes=None, code=0):
    """`python -m rtdmd_jax.<module>`; returns what it printed, stdout and stderr as they came."""
    overrides = [f"--config.{key}={value}" for key, value in (sizes or {}).items()]
    start = time.monotonic()
    ended = subprocess.run(
      [sys.executable, "-m", f"rtdmd_jax.{module}", *flags, *overrides],
      cwd=self.folder, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      text=True, timeout=900,
    )  # fmt: skip
    self._times.append((time.monotonic() - start, module, flags))
    assert ended.returncode == code, f"{module} {flags}: {ended.returncode}\n{ended.stdout[-4000:]}"
    assert "Traceback" not in ended.stdout, ended.stdout[-4000:]
    return ended.stdout

  def print_times(self):
    """Seconds of each command, for `pytest -rP`."""
    for seconds, module, flags in self._times:
      print(f"{seconds:6.1f} s  {module} {' '.join(flags)}")

  def json(self, path):
    """A JSON file of the folder."""
    return json.loads((self.folder / path).read_text())


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
  """A folder for all workers of the session, with the reward services up."""
  base = tmp_path_factory.getbasetemp()
  folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "rehearsal"
  folder.mkdir(exist_ok=True)
  with services.running(folder):
    yield folder


def test_every_config_is_rehearsed():
  """The published ones here, those of the tiny pipeline by the pages that show them."""
  shipped = {path.stem for path in (ROOT / "configs").glob("*.py")} - set(LIBRARIES)
  text = "\n".join(block.text for block in docs_blocks.collect() if docs_blocks.runs(block))
  shown = set(re.findall(r"rtdmd_jax\.\w+ --config=configs/(tiny_\w+)\.py", text))
  assert shipped == {f"{f}_{kind}" for f in FAMILIES for kind in KINDS} | shown


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, shared, tmp_path):
  user = User(tmp_path, shared / "compiled")
  layout.lay_out(tmp_path, family)
  try:
    train(user, family)
    use(user, family)
  finally:
    user.print_times()


def train(user, family):
  """--check and training of both stages."""
  for stage, sizes in (("stage1", TRAIN), ("stage2", STAGE2)):
    # One family's stage 1 is evaluated by the rewards of its published cold start.
    scored = ":scored" if (family, stage) == ("sd3", "stage1") else ""
    config = f"--config=configs/{family}_{stage}.py{scored}"
    workdir = f"--workdir=runs/{family}_{stage}"
    checked = user.run("main", "--check", config, workdir, sizes=sizes)
    assert checked.splitlines()[-1] == "no problem found", checked
    user.run("main", config, workdir, sizes=sizes)
    assert_trained(user, f"runs/{family}_{stage}")
  table = user.json(f"runs/{family}_stage2/evaluation.json")
  rewards = layout.families().HELD_OUT
  for system in table["systems"]:
    assert set(rewards) <= set(system["scores"])
    assert {name: s["n"] for name, s in system["scores"].items()} == dict.fromkeys(rewards, 3)


def assert_trained(user, workdir):
  """A run of `STEPS` steps whose networks moved, with its export, evaluation and report."""
  lines = (user.folder / workdir / "metrics.jsonl").read_text().splitlines()
  seen = {}
  for line in lines:
    seen |= json.loads(line)["scalars"]
  assert seen["generator/skipped_total"] == seen["fake_score/skipped_total"] == 0
  assert seen["generator/grad_norm"] > 0 and seen["fake_score/grad_norm"] > 0
  for role in ("generator", "fake_score"):
    file = user.folder / workdir / f"export/{role}/adapter_model.safetensors"
    assert any(np.abs(b).max() > 0 for b in _tensors(file, "lora_B").values())
  for name in ("evaluation.json", "report.html", "export/generator/README.md"):
    assert (user.folder / workdir / name).is_file()


def use(user, family):
  """Images, scores and exports of the result, and diffusers with each export."""
  adapter = f"runs/{family}_stage2/export/generator"
  out = f"--workdir=runs/{family}_infer"
  prompt = ("--prompt=a photo of a red apple", "--seeds=1,2", "--grid")
  user.run("sample", f"--config=configs/{family}_infer.py", out, *prompt, sizes=INFER)
  for seed in (1, 2):
    image = np.asarray(Image.open(user.folder / f"runs/{family}_infer/00000_{seed}.png"))
    assert image.shape == (64, 64, 3) and image.std() > 0
  out = f"--workdir=runs/{family}_eval"
  user.run("evaluate", f"--config=configs/{family}_eval.py", out, sizes=EVAL)
  for system in user.json(f"runs/{family}_eval/summary.json")["systems"]:
    published = {name: system["scores"][name]["n"] for name in layout.families().HELD_OUT}
    assert set(published.values()) == {2}, (system["name"], published)
  base = Path(layout.families().infer(family).pipeline).name
  for form in ("peft", "comfyui", "merged"):
    dtype = ("--dtype=float32",) if form == "merged" else ()
    flags = (f"--pipeline=checkpoints/{base}", f"--lora={adapter}", f"--format={form}")
    user.run("export", *flags, f"--out=out/{form}", *dtype)
  assert_same_in_diffusers(user, family, base, adapter)


def assert_same_in_diffusers(user, family, base, adapter):
  """diffusers adds to each weight what the merged export holds beyond the base."""
  pipeline = getattr(diffusers, PIPELINES[family])
  root = user.folder

  def load():
    return pipeline.from_pretrained(root / "checkpoints" / base, torch_dtype=torch.float32)

  before = load().transformer.state_dict()
  network = type(load().transformer)
  merged = network.from_pretrained(root / "out/merged", torch_dtype=torch.float32).state_dict()
  changed = {key for key in before if not torch.equal(before[key], merged[key])}
  assert changed
  for directory in (root / adapter, root / "out/peft"):
    pipe = load()
    pipe.load_lora_weights(directory)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    for key in before:
      wanted, got = merged[key] - before[key], after[key] - before[key]
      assert (wanted - got).abs().max() <= 1e-3 * wanted.abs().max() + 1e-9, key


def _tensors(file, part):
  from safetensors.numpy import load_file

  return {key: value for key, value in load_file(file).items() if part in key}
