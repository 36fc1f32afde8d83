"""Scaled dot-product attention, in one place so that a platform's kernel can replace it."""

import jax


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """softmax(q k^T / sqrt(D)) v for every head; the softmax is float32 whatever the inputs are.

  Args:
    q: [B, Lq, H, D].
    k, v: [B, Lk, H, D].
    mask: bool, broadcastable to [B, H, Lq, Lk] with four axes; False hides a key.

  Returns:
    [B, Lq, H, D] in the type of `v`.
  """
  return jax.nn.dot_product_attention(q, k, v, mask=mask)
