"""A pretrained text-to-image pipeline: a diffusers directory, opened."""

from rtdmd_jax.pipeline.pipeline import Pipeline as Pipeline
