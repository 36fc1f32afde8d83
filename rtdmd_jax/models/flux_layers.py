"""Layers that FLUX.1 and FLUX.2 share: attention with rotary positions over text and image."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.attention import attention
from rtdmd_jax.models.heads import join_heads
from rtdmd_jax.models.layers import Dense
from rtdmd_jax.models.mmdit_layers import RENAMES, branch, modulate, project_heads
from rtdmd_jax.models.norms import layer_norm
from rtdmd_jax.models.rotary import Rotary, rotate_pairs
from rtdmd_jax.weights.key_table import KeyTable, Stack

# Both runs of blocks are stacks under the checkpoint's own names.
TABLE = KeyTable(
  stacks=[Stack(name, name) for name in ("transformer_blocks", "single_transformer_blocks")],
  renames=RENAMES,
)
# Text comes first wherever the two kinds of tokens stand in one sequence.
Streams = tuple[jax.Array, jax.Array]


def check_config(config: Any, *, axes: int) -> None:
  """Checks what both families' configs have in common; positions have `axes` coordinates.

  Raises:
    UserError: values that do not fit together, or a variant with another use.
  """
  if sum(config.axes_dims_rope) != config.attention_head_dim:
    raise UserError(
      f"axes_dims_rope is {list(config.axes_dims_rope)}, expected numbers that add up to"
      f" attention_head_dim = {config.attention_head_dim}."
    )
  if any(n % 2 for n in config.axes_dims_rope):
    raise UserError(f"axes_dims_rope is {list(config.axes_dims_rope)}, expected even numbers.")
  if len(config.axes_dims_rope) != axes:
    raise UserError(f"axes_dims_rope is {list(config.axes_dims_rope)}, expected {axes} numbers.")
  if config.patch_size != 1:
    raise UserError(f"patch_size is {config.patch_size}, expected 1 (packing is separate).")
  if config.out_channels not in (None, config.in_channels):
    raise UserError(
      f"out_channels is {config.out_channels}, expected in_channels = {config.in_channels}; fill"
      " and control variants are not text-to-image models."
    )
  for name in ("num_layers", "num_single_layers"):
    if getattr(config, name) < 1:
      raise UserError(f"{name} is {getattr(config, name)}, expected at least 1.")


def grid_positions(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
  """Row and column of every image token in row-major order, each [height * width]."""
  rows, columns = np.mgrid[:height, :width]
  return rows.reshape(-1), columns.reshape(-1)


def rotary_attention(q: jax.Array, k: jax.Array, v: jax.Array, rotary: Rotary) -> jax.Array:
  """Attention after turning q and k; all [B, L, H, D / H], the output [B, L, D]."""
  return join_heads(attention(rotate_pairs(q, rotary), rotate_pairs(k, rotary), v))


class JointAttention(nn.Module):
  """Attention of text and image tokens to each other, with projections of their own."""

  heads: int
  use_bias: bool
  eps: float
  dtype: Any

  @nn.compact
  def __call__(self, context: jax.Array, x: jax.Array, rotary: Rotary) -> Streams:
    """Maps context [B, L, D] and x [B, N, D] to the same; rotary is that of L + N tokens."""
    length, width = context.shape[1], x.shape[2]
    options = {
      "heads": self.heads,
      "use_bias": self.use_bias,
      "eps": self.eps,
      "dtype": self.dtype,
    }
    own = project_heads(x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), **options)
    names = ("add_q_proj", "add_k_proj", "add_v_proj")
    added = project_heads(context, names, ("norm_added_q", "norm_added_k"), **options)
    q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(added, own, strict=True))
    y = rotary_attention(q, k, v, rotary)
    context_out = Dense(width, self.use_bias, self.dtype, name="to_add_out")(y[:, :length])
    return context_out, Dense(width, self.use_bias, self.dtype, name="to_out_0")(y[:, length:])


def joint_block(
  streams: Streams,
  text: Sequence[jax.Array],
  image: Sequence[jax.Array],
  rotary: Rotary,
  *,
  attend: JointAttention,
  feed_forward: Callable[..., nn.Module],
  eps: float,
) -> Streams:
  """Joint attention, then a feed-forward network each for text and image.

  Args:
    streams: text [B, L, D] and image [B, N, D].
    text, image: six modulations each, [B, 1, D].
    rotary: that of L + N tokens.
    attend: the attention.
    feed_forward: makes a network, given its name; inside a compact method.
    eps: of the norms.
  """
  context, x = streams
  text_attended, attended = attend(
    modulate(layer_norm(context, eps), *text[:2]), modulate(layer_norm(x, eps), *image[:2]), rotary
  )
  x = branch(x + image[2] * attended, feed_forward(name="ff"), *image[3:], eps=eps)
  context = context + text[2] * text_attended
  return branch(context, feed_forward(name="ff_context"), *text[3:], eps=eps), x
