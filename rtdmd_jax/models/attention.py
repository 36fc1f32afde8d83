"""Scaled dot-product attention, in one place so that a platform's kernel can replace it."""

import jax

from rtdmd_jax.sharding import constrain


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array | None = None,
  *,
  bias: jax.Array | None = None,
  scale: float | None = None,
) -> jax.Array:
  """softmax(scale q k^T + bias) v for every head, float32 inside whatever the inputs are.

  Args:
    q: [B, Lq, H, D].
    k, v: [B, Lk, H, D].
    mask: bool, broadcastable to [B, H, Lq, Lk] with four axes; False hides a key.
    bias: broadcastable likewise.
    scale: None takes 1 / sqrt(D).

  Returns:
    [B, Lq, H, D] in the type of `v`.
  """
  q, k, v = (constrain(x, None, "tensor") for x in (q, k, v))
  out = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=scale)
  return constrain(out, None, "tensor")
