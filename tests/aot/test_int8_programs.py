"""The programs of a run over int8 bases hold no floating-point copy of one."""

import jax
import jax.numpy as jnp
import pytest

from rtdmd_jax.aot.abstract import abstract_batch, abstract_setup
from rtdmd_jax.config import load_config
from rtdmd_jax.training.programs import compile_programs
from rtdmd_jax.training.stages import initial_state, step_programs
from tests.support.paths import CONFIGS
from tests.support.programs import float_results

# Six images at once, so that no activation has the shape of a stack of five blocks.
OVERRIDES = [
  "model.base_storage=int8",
  "batch.prompts=3",
  "batch.images_per_prompt=2",
  "batch.micro_batches=1",
]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["tiny_stage1.py", "tiny_stage2.py"])
def test_no_program_makes_floats_of_a_stack_of_kernels(config):
  config = load_config(str(CONFIGS / config), OVERRIDES)
  setup = abstract_setup(config)
  (base,) = setup.frozen.bases.values()
  stacks = {a.shape for a in jax.tree.leaves(base) if a.dtype == jnp.int8 and a.ndim == 3}
  assert stacks == {(5, 128, n) for n in (128, 512, 768)} | {(5, 512, 128)}
  state = jax.eval_shape(lambda: initial_state(config, setup))
  known = {"state": state, "frozen": setup.frozen, "batch": abstract_batch(config, setup)}
  programs = step_programs(config, setup)
  compiled = compile_programs(programs, config.seed)
  for program in programs:
    name, args = program.name, program.arguments(known)
    found = float_results(jax.make_jaxpr(compiled[name])(*args), stacks)
    assert not found, (name, found)
    if name == "rollout":
      score = jax.ShapeDtypeStruct((6,), jnp.float32)
      known["samples"] = jax.eval_shape(compiled[name], *args)
      known["rewards"] = dict.fromkeys(config.rewards, score)
