"""Every published program is lowered for GPUs, gradients included, on a machine without one."""

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from rtdmd_jax.aot.abstract import abstract_batch, abstract_setup
from rtdmd_jax.config import load_config
from rtdmd_jax.training.programs import compile_programs
from rtdmd_jax.training.stages import initial_state, step_programs

FAMILIES = ("sd3", "sd35", "flux1", "flux2", "flux2_9b")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_program_lowers_with_cudnns_attention(family, stage, monkeypatch):
  # Only its number is asked for; without the plugin there is none.
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
  config = load_config(f"rtdmd_jax:{family}_{stage}", ["model.attention=cudnn"])
  setup = abstract_setup(config)
  state = jax.eval_shape(lambda: initial_state(config, setup))
  known = {"state": state, "frozen": setup.frozen, "batch": abstract_batch(config, setup)}
  programs = step_programs(config, setup)
  compiled = compile_programs(programs, config.seed)
  for program in programs:
    traced = compiled[program.name].trace(*program.arguments(known))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("fmhaSoftmax" in text) == (program.name != "finish"), program.name
    trains = program.name in ("fake_score", "generator", "policy")
    assert ("fmhaSoftmaxBackward" in text) == trains, program.name
    if program.name == "rollout":
      count = config.batch.prompts * config.batch.images_per_prompt
      score = jax.ShapeDtypeStruct((count,), jnp.float32)
      known |= {"samples": traced.out_info, "rewards": dict.fromkeys(config.rewards, score)}
