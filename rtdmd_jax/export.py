"""What training leaves behind: adapters that PEFT and diffusers load."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from rtdmd_jax.build import Setup
from rtdmd_jax.models.lora import fold_scale
from rtdmd_jax.state import TrainState
from rtdmd_jax.weights.peft import save_peft

Tree = Any


def stack_adapters(first: Tree, second: Tree) -> Tree:
  """One adapter tree that adds what both add; ranks add up where both have an entry.

  Scales must be folded in: `a1 b1 + a2 b2 = [a1 a2] [b1; b2]`.
  """
  one, two = flatten_dict(first), flatten_dict(second)
  if one and two and one.keys() != two.keys():
    raise ValueError("adapters of different modules cannot share one rank")
  out = one or two
  if one and two:
    axis = {"a": -1, "b": -2}
    out = {path: jnp.concatenate([one[path], two[path]], axis[path[-1]]) for path in one}
  return unflatten_dict(out)


def export_adapters(config: Any, setup: Setup, state: TrainState, directory: Path) -> None:
  """Writes `generator/` (the moving average) and `fake_score/`, earlier stages included."""
  table = setup.pipeline.transformer.table
  for name, frozen, trained in (
    ("generator", setup.frozen.generator, state.ema),
    ("fake_score", setup.frozen.fake_score, state.fake_score),
  ):
    adapters = stack_adapters(frozen, fold_scale(trained, config.lora.alpha))
    rank = next(v.shape[-1] for p, v in flatten_dict(adapters).items() if p[-1] == "a")
    # The scale is in b, so alpha equals the rank.
    save_peft(
      directory / name,
      adapters,
      table,
      rank=rank,
      alpha=float(rank),
      targets=list(config.lora.targets),
    )
