"""Rewards: `make({"geneval": 1.0, ...})` builds a scorer of images against their prompts."""

from rtdmd_jax.rewards.multi import make as make
