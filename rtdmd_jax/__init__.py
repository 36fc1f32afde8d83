"""Reward-tilted distribution matching distillation of flow transformers, in JAX and Flax."""

__version__ = "0.1.0"
