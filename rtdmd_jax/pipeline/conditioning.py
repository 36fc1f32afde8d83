"""Encoded prompts."""

import flax.struct
import jax


@flax.struct.dataclass
class Conditioning:
  """Encoded prompts: `tokens` [B, L, D] and, where the backbone has it, `pooled` [B, P]."""

  tokens: jax.Array
  pooled: jax.Array | None

  def take(self, index: jax.Array) -> "Conditioning":
    """The rows `index` [N] of every array."""
    return jax.tree.map(lambda a: a[index], self)
