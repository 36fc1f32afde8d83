"""How a family joins its text encoders' outputs into the transformer's conditioning."""

import jax
import jax.numpy as jnp

from rtdmd_jax.state import Conditioning


def sd3_conditioning(clip: jax.Array, pooled: jax.Array, t5: jax.Array) -> Conditioning:
  """SD3's conditioning: CLIP tokens, zero-padded to T5's width, then T5's tokens.

  Args:
    clip: [B, L1, D1 + D2], penultimate states of both CLIP towers side by side.
    pooled: [B, P], their pooled projections side by side.
    t5: [B, L2, D], D at least D1 + D2.
  """
  padded = jnp.pad(clip, ((0, 0), (0, 0), (0, t5.shape[-1] - clip.shape[-1])))
  return Conditioning(jnp.concatenate([padded, t5.astype(padded.dtype)], axis=1), pooled)
