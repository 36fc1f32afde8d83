"""The 2 x 2 packing of latents that FLUX.1's transformer and FLUX.2's autoencoder share."""

import jax


def pack(x: jax.Array) -> jax.Array:
  """Maps [B, H, W, C] to [B, H / 2, W / 2, 4 C]; feature 4 c + 2 i + j is row i, column j of c."""
  b, h, w, c = x.shape
  if h % 2 or w % 2:
    raise ValueError(f"latents are {h} x {w}: both sides must be even")
  x = x.reshape(b, h // 2, 2, w // 2, 2, c)
  return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, h // 2, w // 2, 4 * c)


def unpack(x: jax.Array) -> jax.Array:
  """Maps [B, h, w, 4 C] to [B, 2 h, 2 w, C], the inverse of `pack`."""
  b, h, w, features = x.shape
  x = x.reshape(b, h, w, features // 4, 2, 2)
  return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, 2 * h, 2 * w, features // 4)
