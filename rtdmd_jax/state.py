"""What a training step reads and writes."""

from typing import Any

import flax.struct
import jax

Tree = Any


@flax.struct.dataclass
class TrainState:
  """Everything that training changes; a checkpoint holds exactly this.

  `generator` and `fake_score` are the adapters being trained, `ema` the moving average of the
  generator's, always float32. Randomness is a function of the seed and `step`, so no key needs to
  be stored.
  """

  step: jax.Array
  generator: Tree
  fake_score: Tree
  ema: Tree
  generator_opt: Tree
  fake_score_opt: Tree


@flax.struct.dataclass
class Frozen:
  """What training reads and never changes.

  `bases` maps a base's key to its parameters, so that roles that share a base share the arrays;
  `generator` and `fake_score` are earlier stages' adapters with their scale folded in (or empty).
  `rewards` holds the parameters of the rewards on the device, `vae` those of the decoder.
  """

  bases: dict[str, Tree]
  generator: Tree
  fake_score: Tree
  vae: Tree
  rewards: dict[str, Tree]


@flax.struct.dataclass
class Conditioning:
  """Encoded prompts: `tokens` [B, L, D] and, where the backbone has it, `pooled` [B, P]."""

  tokens: jax.Array
  pooled: jax.Array | None

  def take(self, index: jax.Array) -> "Conditioning":
    """The rows `index` [N] of every array."""
    return jax.tree.map(lambda a: a[index], self)
