"""The decoder of Qwen3 (arXiv 2505.09388) as a text encoder, in the layout of transformers.

Only hidden states of chosen layers are wanted, so the layers after the last of them are neither
loaded nor computed. The layers between two chosen ones are one stacked subtree
`layers_{first index}`, with the names of `Qwen3ForCausalLM` inside.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.attention import attention
from rtdmd_jax.models.layers import Dense
from rtdmd_jax.models.norms import RMSNorm
from rtdmd_jax.models.rotary import Rotary, rotary_table, rotate_halves
from rtdmd_jax.models.stack import stack_blocks
from rtdmd_jax.models.transformer import check_types
from rtdmd_jax.weights.key_table import KeyTable, Stack

# Config values that would change the computation, and the only ones supported.
_FIXED = {"model_type": "qwen3", "hidden_act": "silu", "use_sliding_window": False}


@dataclass(frozen=True)
class Qwen3Config:
  """The fields of config.json that the computation needs; published files name them all."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rms_norm_eps: float
  attention_bias: bool
  rope_theta: float

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "Qwen3Config":
    """Reads config.json; transformers' many fields without a part in the computation are skipped.

    Raises:
      UserError: another model type, a missing field, or a variant that is not supported.
    """
    for key, expected in _FIXED.items():
      if config.get(key, expected) != expected:
        raise UserError(f"{key} is {config[key]!r} in a Qwen3 config, expected {expected!r}.")
    values = {f.name: config[f.name] for f in fields(cls) if f.name in config}
    # Newer files keep what concerns rotation in a dict of its own.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
      raise UserError(f"rope_type is {kind!r} in a Qwen3 config, expected 'default'.")
    if "rope_theta" in rope:
      values["rope_theta"] = rope["rope_theta"]
    missing = [f.name for f in fields(cls) if f.name not in values]
    if missing:
      raise UserError(f"the Qwen3 config lacks {missing[0]!r}.")
    check_types("Qwen3", cls, values)
    return cls(**values)


def check_layers(config: Qwen3Config, layers: Sequence[int]) -> None:
  """Checks that `layers` increase within the network.

  Raises:
    UserError: they do not.
  """
  ascending = all(a < b for a, b in pairwise((-1, *layers)))
  if not layers or not ascending or layers[-1] > config.num_hidden_layers:
    raise UserError(
      f"hidden states {list(layers)} are asked for, expected increasing numbers from 0 to"
      f" num_hidden_layers = {config.num_hidden_layers}."
    )


def runs(layers: Sequence[int]) -> list[tuple[int, int]]:
  """(first index, length) of the layers before each chosen hidden state; a length may be 0."""
  return [(first, last - first) for first, last in pairwise((0, *layers))]


def key_table(layers: Sequence[int]) -> KeyTable:
  """Maps the parameters of `Qwen3(config, layers)` to the checkpoint's keys."""
  stacks = [Stack(f"layers_{first}", "model.layers", first) for first, n in runs(layers) if n]
  return KeyTable(stacks, renames=[(r"^(embed_tokens|norm)$", r"model.\1")])


def ignored_keys(config: Qwen3Config, layers: Sequence[int]) -> tuple[str, ...]:
  """Regular expressions of the checkpoint's keys that `Qwen3(config, layers)` does not need."""
  ignored = [rf"model\.layers\.{i}\..*" for i in range(layers[-1], config.num_hidden_layers)]
  if layers[-1] < config.num_hidden_layers:
    ignored.append(r"model\.norm\.weight")
  return (r"lm_head\.weight", *ignored)


class Qwen3(nn.Module):
  """Hidden states of transformers' `Qwen3ForCausalLM`, numbered as it numbers them.

  State 0 is the embedding, state k the output of k layers, and the last one is normalised.
  """

  config: Qwen3Config
  layers: tuple[int, ...]
  dtype: Any = jnp.float32
  scan: bool = True

  @nn.compact
  def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Maps ids [B, L] to the chosen hidden states side by side, [B, L, len(layers) * D].

    Args:
      ids: token ids, padded at the end.
      mask: bool [B, L], False hides a token from all others. The states of hidden tokens are
        computed all the same, for FLUX.2 attends to them.
    """
    c = self.config
    if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
      raise ValueError(f"ids are {ids.shape} and mask {getattr(mask, 'shape', None)}, not [B, L]")
    length = ids.shape[1]
    visible = jnp.tril(jnp.ones((length, length), bool))[None, None]
    if mask is not None:
      visible = visible & mask.astype(bool)[:, None, None, :]
    # transformers computes these angles in float32.
    rotary = rotary_table(np.arange(length)[:, None], (c.head_dim,), c.rope_theta, np.float32)
    x = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, name="embed_tokens")(ids)
    states = []
    for first, count in runs(self.layers):
      if count:
        stack = stack_blocks(Layer, count, scan=self.scan, remat="none")
        x, _ = stack(c, self.dtype, name=f"layers_{first}")(x, rotary, visible)
      states.append(x)
    if self.layers[-1] == c.num_hidden_layers:
      states[-1] = RMSNorm(c.rms_norm_eps, self.dtype, name="norm")(x)
    return jnp.concatenate(states, axis=-1)


class Layer(nn.Module):
  """Normalised self-attention, then a normalised SwiGLU network, each with a residual."""

  config: Qwen3Config
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, rotary: Rotary, visible: jax.Array) -> tuple[jax.Array, None]:
    """Maps x [B, L, D] to the same, given bool visible [B, 1, L, L]."""
    c = self.config
    y = RMSNorm(c.rms_norm_eps, self.dtype, name="input_layernorm")(x)
    x += SelfAttention(c, self.dtype, name="self_attn")(y, rotary, visible)
    y = RMSNorm(c.rms_norm_eps, self.dtype, name="post_attention_layernorm")(x)
    return x + FeedForward(c, self.dtype, name="mlp")(y), None


class SelfAttention(nn.Module):
  """Grouped-query attention (arXiv 2305.13245) with normalised queries and keys."""

  config: Qwen3Config
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, rotary: Rotary, visible: jax.Array) -> jax.Array:
    """Maps x [B, L, D] to the same shape."""
    c = self.config
    heads = {
      "q_proj": c.num_attention_heads,
      "k_proj": c.num_key_value_heads,
      "v_proj": c.num_key_value_heads,
    }
    q, k, v = (
      self._dense(n * c.head_dim, name)(x).reshape(*x.shape[:2], n, c.head_dim)
      for name, n in heads.items()
    )
    q = rotate_halves(RMSNorm(c.rms_norm_eps, self.dtype, name="q_norm")(q), rotary)
    k = rotate_halves(RMSNorm(c.rms_norm_eps, self.dtype, name="k_norm")(k), rotary)
    y = attention(q, k, v, visible)
    return self._dense(c.hidden_size, "o_proj")(y.reshape(*x.shape[:2], -1))

  def _dense(self, features: int, name: str) -> Dense:
    return Dense(features, self.config.attention_bias, self.dtype, name=name)


class FeedForward(nn.Module):
  """SwiGLU (arXiv 2002.05202)."""

  config: Qwen3Config
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, L, D] to [B, L, D]."""
    hidden = self.config.intermediate_size
    y = nn.silu(Dense(hidden, False, self.dtype, name="gate_proj")(x))
    y *= Dense(hidden, False, self.dtype, name="up_proj")(x)
    return Dense(x.shape[-1], False, self.dtype, name="down_proj")(y)
