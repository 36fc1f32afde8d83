"""Offloaded kernels in the programs of a run: they come to the device block by block."""

import jax
import pytest

from rtdmd_jax.aot.abstract import abstract_setup
from rtdmd_jax.aot.compile import abstract_run, samples
from rtdmd_jax.config import load_config
from rtdmd_jax.runtime import sharding


def copies(jaxpr, loops=0):
  """(loops around it, whether its results are a loop's stacked outputs) of every copy."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "device_put":
      yield loops, any(eqn.outvars[0] is out for out in jaxpr.outvars)
    for value in eqn.params.values():
      for inner in value if isinstance(value, tuple) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from copies(inner, loops + (eqn.primitive.name == "scan"))


@pytest.mark.slow
@pytest.mark.parametrize("stage, program", [("stage1", "fake_score"), ("stage2", "policy")])
def test_no_program_keeps_a_stack_of_fetched_kernels(stage, program):
  """The gradient of a loop around the network must not take the copies out of that loop."""
  keys = ["model.offload=true", "model.remat=full"]
  config = load_config(f"rtdmd_jax:tiny_{stage}", keys)
  setup = abstract_setup(config)
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    run = abstract_run(config, setup, mesh)
    if stage == "stage2":
      run.known.update(samples(run, lambda shapes: shapes))
    traced = run.compiled[program].trace(*run.programs[program].arguments(run.known))
  found = list(copies(traced.jaxpr.jaxpr))
  assert len(found) > 20 and all(loops for loops, _ in found)
  assert not any(kept for _, kept in found)
