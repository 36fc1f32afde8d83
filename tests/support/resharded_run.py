"""Trains both stages on one mesh and, with a checkpoint between, on several in turn.

`python tests/support/resharded_run.py DEVICES STEPS OUT DATA,FSDP,TENSOR ...`: STEPS steps on
each mesh, and as many in all on the first one.
"""

import sys

import numpy as np

from rtdmd_jax.runtime.checkpoint import Checkpoints
from tests.support.sharded_run import advance, on, stages, values


def main():
  steps, out, meshes = int(sys.argv[2]), sys.argv[3], sys.argv[4:]
  programs, ends = {}, {}
  for mesh in dict.fromkeys(meshes):
    with on(mesh):
      programs[mesh] = stages()
  for stage in ("stage1", "stage2"):

    def train(state, mesh, numbers, stage=stage):
      for number in numbers:
        state, _ = advance(programs[mesh][1][stage], state, number)
      return state

    with on(meshes[0]):
      state = train(programs[meshes[0]][0], meshes[0], range(steps * len(meshes)))
      ends |= {f"whole/{stage}/{role}": values(state, role) for role in ("generator", "fake_score")}
    for place, mesh in enumerate(meshes):
      with on(mesh), Checkpoints(f"{out}/{stage}") as saved:
        state = programs[mesh][0]
        if place:
          state, _ = saved.restore(state)
        state = train(state, mesh, range(place * steps, (place + 1) * steps))
        saved.save((place + 1) * steps, state, {})
    ends |= {f"parts/{stage}/{role}": values(state, role) for role in ("generator", "fake_score")}
  np.savez(f"{out}/ends.npz", **ends)


main()
