"""The reward server: `python -m rtdmd_jax.rewards.serve`."""
