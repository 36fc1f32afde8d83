import shutil

import numpy as np
import pytest
from guides import ROOT, blocks, checkout, run
from test_train import SMALL, _run

from rtdmd_jax.prompts import load_prompts


def test_what_is_promised_in_ten_lines_takes_ten():
  for section in ("A reward in ten lines", "A prompt set in ten lines"):
    _, text = blocks(section)[0]
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert 5 < len(lines) <= 10


def test_the_reward_measures_what_it_says():
  names = {}
  exec(blocks("A reward in ten lines")[0][1], names)
  images = np.zeros((3, 4, 4, 3), np.uint8)
  images[0, ..., 0] = 255
  images[1] = 128
  images[2, ..., 1] = 255
  np.testing.assert_allclose(names["make"](gain=2.0)(images, [""] * 3, None), [2, 0, -1], atol=1e-6)


@pytest.mark.slow
def test_the_reward_is_in_the_checked_run(tmp_path):
  seen = run("A reward in ten lines", checkout(tmp_path))
  assert "redness:make" in seen and seen.endswith("no problem found\n")


@pytest.mark.slow
def test_the_prompt_set_is_read(tmp_path):
  seen = run("A prompt set in ten lines", checkout(tmp_path))
  assert "prompts: 16 to train on, 4 held out" in seen and seen.endswith("no problem found\n")
  (first, *_) = load_prompts(tmp_path / "my_prompts", split="test")
  assert first.text.startswith("a photo of a pink") and first.record["tag"]


@pytest.mark.slow
def test_the_file_for_comfyui_is_written(tmp_path):
  run("The LoRA in ComfyUI", checkout(tmp_path))
  assert (tmp_path / "comfyui_lora/comfyui_lora.safetensors").stat().st_size > 10_000


@pytest.mark.slow
def test_a_checkpoint_is_exported_drawn_and_evaluated(tmp_path):
  small = [*SMALL, "--config.train.steps=1", "--config.train.fake_update_ratio=1"]
  assert _run(tmp_path / "runs/tiny", *small, config="tiny_stage1.py") == 0
  shutil.copytree(tmp_path / "runs/tiny", tmp_path / "runs/stage1")
  for name, step in (("tiny", 20), ("stage1", 300)):  # as if it had trained for longer
    (tmp_path / f"runs/{name}/checkpoints/1").rename(tmp_path / f"runs/{name}/checkpoints/{step}")
  run("Stop earlier", checkout(tmp_path))
  for name in ("step20", "step300_fake_score"):
    assert (tmp_path / name / "adapter_model.safetensors").stat().st_size > 10_000
  assert (tmp_path / "step20_images/00000_42.png").exists()
  assert "checkpoint_20" in (tmp_path / "step20_scores/summary.json").read_text()


def test_the_page_names_its_tests():
  text = (ROOT / "docs/guides.md").read_text()
  for name in ("tests/test_guides.py", "tests/parity/test_guides.py"):
    assert name in text and (ROOT / name).exists()
