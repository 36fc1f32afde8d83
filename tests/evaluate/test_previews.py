"""What a preview shows: teacher, generator, and what the fake score takes its images for."""

import jax
import numpy as np
import pytest
from PIL import Image

from rtdmd_jax.config import load_config
from rtdmd_jax.evaluate import evaluator as evaluator_module
from rtdmd_jax.evaluate import held_out, systems
from rtdmd_jax.evaluate.evaluator import Evaluator
from rtdmd_jax.report import captions
from rtdmd_jax.runtime.metrics import MetricWriter
from rtdmd_jax.training.describe import new_adapters
from rtdmd_jax.training.setup import build
from tests.support.paths import CONFIGS


def test_prompts_that_no_font_can_draw_are_written_beside(tmp_path, monkeypatch):
  monkeypatch.setattr(captions, "_faces", lambda: ("",))
  texts = ("a cat", "一只红色的猫", "قطة حمراء")
  said = []
  monkeypatch.setattr(MetricWriter, "text", lambda *args: said.append(args[1:]))
  with MetricWriter(tmp_path, resume_step=-1) as writer:
    held_out._write_preview(5, Image.new("RGB", (8, 8)), list(texts), writer, tmp_path)
  want = [f"prompt {i}: {text}" for i, text in enumerate(texts) if text != "a cat"]
  assert (tmp_path / "previews/step_000005.txt").read_text("utf-8").splitlines() == want
  ((step, name, table),) = said
  assert (step, name) == (5, "preview") and all(text in table for text in texts[1:])


@pytest.mark.slow
def test_the_fake_score_predicts_from_the_generators_own_images(monkeypatch):
  overrides = ["eval.chunk=4", "eval.teacher_steps=2"]
  config = load_config(str(CONFIGS / "tiny_stage2.py"), overrides)
  setup = build(config)
  evaluator, prompts = Evaluator(setup, config), setup.held_out[:6]
  adapters = new_adapters(config, setup.pipeline, jax.random.key(0))
  system = systems.generator(setup, config, "generator", adapters)
  images = evaluator.images(system, prompts).astype(float)
  seen = evaluator.predictions(system, adapters, prompts)
  assert seen.dtype == np.uint8 and seen.shape == images.shape
  distance = np.array([[np.abs(a - b).mean() for b in images] for a in seen.astype(float)])
  own = np.diagonal(distance)
  assert (own > 0.5).all()  # it saw noise
  assert own.mean() < 0.8 * distance[~np.eye(6, dtype=bool)].mean()  # on these images
  # Without noise nothing is left to predict.
  monkeypatch.setattr(evaluator_module, "PREDICTION_SIGMA", 0.0)
  clean = Evaluator(setup, config).predictions(system, adapters, prompts)
  np.testing.assert_allclose(clean.astype(float), images, atol=1)
  # The teacher's are drawn once.
  teacher = systems.teacher(setup, config)
  first = evaluator.teacher_images(teacher, prompts)
  assert evaluator.teacher_images(teacher, prompts) is first
  assert evaluator.teacher_images(teacher, prompts[:2]).shape[0] == 2
