"""Networks in Flax, with the module names of the public checkpoints."""

from rtdmd_jax.models.load import build_transformer, load_base, load_transformer
from rtdmd_jax.models.transformer import Transformer

__all__ = ["Transformer", "build_transformer", "load_base", "load_transformer"]
