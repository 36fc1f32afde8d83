"""The head of the LAION aesthetic predictor and of ImageReward: five dense layers, nothing else."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from rtdmd_jax.models.layers import Dense
from rtdmd_jax.weights.key_table import KeyTable

# Width by index in the published `nn.Sequential`, whose other entries are dropout.
_LAYERS = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}
RENAMES = ((r"\blayers_(\d+)", r"layers.\1"),)
TABLE = KeyTable(renames=RENAMES)


class ScoreHead(nn.Module):
  """768 -> 1024 -> 128 -> 64 -> 16 -> 1 without activations, as published; float32."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps features [B, D] to scores [B]."""
    x = x.astype(jnp.float32)
    for index, width in _LAYERS.items():
      x = Dense(width, name=f"layers_{index}")(x)
    return x[:, 0]
