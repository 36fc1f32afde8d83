"""benchmarks/programs.py on the tiny shapes."""

import jax.numpy as jnp
import pytest

from benchmarks import programs
from rtdmd_jax.aot.abstract import abstract_setup
from rtdmd_jax.config import load_config
from tests.support.paths import ROOT


@pytest.mark.slow
def test_every_program_runs_on_random_weights_of_the_configs_shapes():
  overrides = ["batch.prompts=2", "batch.micro_batches=1", "model.base_storage=int8"]
  config = load_config(str(ROOT / "configs/tiny_stage1.py"), overrides)
  setup = abstract_setup(config)
  rows = {row["name"]: row for row in programs.measure(config, setup, rounds=1)}
  assert list(rows) == ["fake_score", "generator", "finish"]
  for name in ("fake_score", "generator"):
    assert rows[name]["tflop"] > 0
    assert rows[name]["tflops"] == pytest.approx(rows[name]["tflop"] / rows[name]["seconds"])
    assert len(rows[name]["spent"]) == 2 and rows[name]["first"] > rows[name]["seconds"]


@pytest.mark.slow
def test_random_leaves_keep_shapes_and_types():
  config = load_config(str(ROOT / "configs/tiny_stage2.py"), ["batch.prompts=2"])
  setup = abstract_setup(config)
  batch = programs.random_batch(config, setup)
  count = 2 * config.batch.images_per_prompt
  assert (
    batch.prompt_index.tolist()
    == [0] * config.batch.images_per_prompt + [1] * config.batch.images_per_prompt
  )
  assert batch.sample_index.shape == (count,) and batch.sample_index.dtype == jnp.uint32
  shapes = programs.random_like(setup.frozen.vae)
  for made, shape in zip(*map(programs.jax.tree.leaves, (shapes, setup.frozen.vae)), strict=True):
    assert (made.shape, made.dtype) == (shape.shape, shape.dtype)
