"""docs/guides.md: its blocks run as they stand, and what comes out is what it says."""

import numpy as np
import pytest
from PIL import Image

from rtdmd_jax.datasets.prompts import load_prompts
from tests.support.docs_blocks import Block, checkout, collect, execute

BLOCKS = [block for block in collect() if block.page == "docs/guides.md"]


def test_the_reward_measures_what_it_says():
  names = {}
  (block,) = (block for block in BLOCKS if block.file == "redness.py")
  exec(block.text, names)
  images = np.zeros((3, 4, 4, 3), np.uint8)
  images[0, ..., 0] = 255
  images[1] = 128
  images[2, ..., 1] = 255
  np.testing.assert_allclose(names["make"](gain=2.0)(images, [""] * 3, None), [2, 0, -1], atol=1e-6)


def _train(folder, config, workdir, step):
  """A short run, whose last checkpoint gets the number that the page takes as an example."""
  command = f"python -m rtdmd_jax.main --config=configs/{config}.py --workdir={workdir}"
  execute(Block("docs/guides.md", 0, "bash", command), folder)
  checkpoints = folder / workdir / "checkpoints"
  (checkpoints / "2").rename(checkpoints / str(step))


@pytest.mark.slow
def test_a_checkpoint_is_exported_drawn_and_evaluated(tmp_path):
  folder = checkout(tmp_path / "checkout", "run")
  _train(folder, "tiny_stage2", "runs/tiny", 20)
  _train(folder, "tiny_stage1", "runs/stage1", 300)
  for block in BLOCKS:
    if "--checkpoint=" in block.text:
      execute(block, folder)
  for name in ("step20", "step300_fake_score"):
    assert (folder / name / "adapter_model.safetensors").stat().st_size > 10_000
  assert (folder / "step20_images/00000_42.png").exists()
  assert "checkpoint_20" in (folder / "step20_scores/summary.json").read_text()


@pytest.mark.slow
def test_rewards_prompts_and_files(tmp_path):
  folder, said = checkout(tmp_path / "checkout", "run"), []
  for block in BLOCKS:
    if "import torch" not in block.text and "--checkpoint=" not in block.text:
      said.append(execute(block, folder))
  checks = [text for text in said if text.endswith("no problem found\n")]
  assert len(checks) == 2
  assert "redness:make" in checks[0]
  assert "prompts: 16 to train on (my_prompts), 4 held out" in checks[1]
  (first, *_) = load_prompts(folder / "my_prompts", split="test")
  assert first.text.startswith("a photo of a pink") and first.record["tag"]
  assert (folder / "comfyui_lora/comfyui_lora.safetensors").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parity
def test_diffusers_draws_with_the_lora(tmp_path):
  pytest.importorskip("torch")
  pytest.importorskip("diffusers")
  folder = checkout(tmp_path / "checkout", "run")
  (block,) = (block for block in BLOCKS if "import torch" in block.text)
  execute(block, folder)
  image = np.asarray(Image.open(folder / "circle.png"))
  assert image.shape == (64, 64, 3) and image.std() > 10
