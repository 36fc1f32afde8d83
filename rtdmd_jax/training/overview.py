"""Lines that a run prints once it is set up."""

from rtdmd_jax.pipeline.text import cut_prompts
from rtdmd_jax.runtime import sharding
from rtdmd_jax.training.setup import Setup
from rtdmd_jax.training.state import TrainState


def print_cut_prompts(setup: Setup) -> None:
  """Says which prompts are too long for a text encoder."""
  sets = {"training prompts": setup.prompts}
  sets |= {f"held-out prompts of {part.path}": part.prompts for part in setup.held_out_sets}
  for what, prompts in sets.items():
    for line in cut_prompts(setup.pipeline.text.limits, [p.text for p in prompts], what):
      print(line)


def print_placement(setup: Setup, state: TrainState) -> None:
  """Says where everything lives, on a mesh of several devices."""
  mesh = sharding.current()
  if mesh is None or mesh.size == 1:
    return
  parts = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  print(f"mesh: {parts}")
  trees = {f"base {name}": base for name, base in setup.frozen.bases.items()}
  trees |= {f"reward {name}": params for name, params in setup.frozen.rewards.items()}
  trees |= {"autoencoder": setup.frozen.vae, "text encoders": setup.pipeline.text.params}
  trees |= {"training state": state}
  for name, count, total, local in sharding.table(trees, mesh):
    sizes = f"{total / 1e6:>10,.1f} MB  {local / 1e6:>10,.1f} MB a device"
    print(f"  {name:24s} {count:>14,} values  {sizes}")
