"""What benchmarks/policy_variance.py compares."""

import jax.numpy as jnp
import numpy as np

from benchmarks import policy_variance as variance
from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.training.state import Batch


def test_a_sample_alone_has_its_own_noise_and_its_prompts_rows(monkeypatch):
  tokens, pooled = jnp.arange(6.0).reshape(2, 3, 1), jnp.arange(4.0).reshape(2, 2)
  rows = jnp.array([0, 0, 1, 1])
  none = Conditioning(jnp.zeros((1, 3, 1)), jnp.zeros((1, 2)))
  text = {"clipscore": jnp.array([[5.0], [7.0]])}
  batch = Batch(Conditioning(tokens, pooled), rows, jnp.arange(4), none, text)
  alone = variance.alone(batch)
  np.testing.assert_array_equal(alone.prompt_index, np.arange(4))
  np.testing.assert_array_equal(alone.sample_index, batch.sample_index)
  for sample, prompt in enumerate(rows):
    np.testing.assert_array_equal(alone.conditioning.tokens[sample], tokens[prompt])
    np.testing.assert_array_equal(alone.conditioning.pooled[sample], pooled[prompt])
    np.testing.assert_array_equal(alone.reward_text["clipscore"][sample], text["clipscore"][prompt])
