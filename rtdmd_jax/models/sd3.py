"""The multimodal diffusion transformer of Stable Diffusion 3 and 3.5 (arXiv 2403.03206).

Parameters have the names of diffusers' `SD3Transformer2DModel`. Runs of identical blocks are one
stacked subtree `blocks_{first index}`; the last block, which has no text output, is `last_block`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.attention import attention
from rtdmd_jax.models.embeddings import sincos_table, timestep_embedding
from rtdmd_jax.models.layers import Dense
from rtdmd_jax.models.norms import RMSNorm, layer_norm
from rtdmd_jax.models.stack import remat_block, stack_blocks
from rtdmd_jax.models.transformer import Transformer, config_values
from rtdmd_jax.weights.maps import KeyTable, Stack

CLASS_NAME = "SD3Transformer2DModel"
_zeros = nn.initializers.zeros


@dataclass(frozen=True)
class SD3Config:
  """Fields of diffusers' config.json, with diffusers' defaults."""

  sample_size: int = 128
  patch_size: int = 2
  in_channels: int = 16
  num_layers: int = 18
  attention_head_dim: int = 64
  num_attention_heads: int = 18
  joint_attention_dim: int = 4096
  caption_projection_dim: int = 1152
  pooled_projection_dim: int = 2048
  out_channels: int | None = 16
  pos_embed_max_size: int = 96
  dual_attention_layers: tuple[int, ...] = ()
  qk_norm: str | None = None

  @property
  def width(self) -> int:
    """Features of the residual streams."""
    return self.num_attention_heads * self.attention_head_dim

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "SD3Config":
    """Reads a config.json; keys with a leading underscore are diffusers' own notes.

    Raises:
      UserError: another class name, an unknown key, or values that do not fit together.
    """
    values = config_values(cls, CLASS_NAME, config)
    values["dual_attention_layers"] = tuple(values.get("dual_attention_layers") or ())
    built = cls(**values)
    built._check()
    return built

  def _check(self) -> None:
    if self.caption_projection_dim != self.width:
      raise UserError(
        f"caption_projection_dim is {self.caption_projection_dim}, expected"
        f" num_attention_heads * attention_head_dim = {self.width}."
      )
    if self.qk_norm not in (None, "rms_norm"):
      raise UserError(f"qk_norm is {self.qk_norm!r}, expected null or 'rms_norm'.")
    if not set(self.dual_attention_layers) <= set(range(self.num_layers)):
      raise UserError(
        f"dual_attention_layers is {list(self.dual_attention_layers)}, but there are"
        f" {self.num_layers} layers."
      )

  def runs(self) -> list[tuple[int, int, bool]]:
    """(first index, length, dual attention) of each run of identical blocks but the last block."""
    dual = [i in self.dual_attention_layers for i in range(self.num_layers - 1)]
    groups = (list(g) for _, g in groupby(range(self.num_layers - 1), key=dual.__getitem__))
    return [(g[0], len(g), dual[g[0]]) for g in groups]


def key_table(config: SD3Config) -> KeyTable:
  """Maps the module's parameters to diffusers' checkpoint keys."""
  return KeyTable(
    stacks=[Stack(f"blocks_{first}", "transformer_blocks", first) for first, _, _ in config.runs()],
    renames=[
      (r"^last_block\b", f"transformer_blocks.{config.num_layers - 1}"),
      (r"\bto_out_0$", "to_out.0"),
      (r"\bnet_0_proj$", "net.0.proj"),
      (r"\bnet_2$", "net.2"),
    ],
  )


def build(config: Mapping[str, Any], *, dtype: Any, scan: bool, remat: str) -> Transformer:
  """Builds the transformer of a config.json; see `models.build_transformer`."""
  c = SD3Config.from_dict(config)
  shapes = (
    (1, c.patch_size, c.patch_size, c.in_channels),
    (1,),
    (1, 1, c.joint_attention_dim),
    (1, c.pooled_projection_dim),
  )
  example = tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
  network = SD3(c, dtype, scan, remat)
  max_side = c.pos_embed_max_size * c.patch_size
  return Transformer(c, network, key_table(c), (*example, None), max_side)


class SD3(nn.Module):
  """Velocity of SD3: image patches and text tokens attend to each other, block after block."""

  config: SD3Config
  dtype: Any = jnp.float32
  scan: bool = True
  remat: str = "none"

  @nn.compact
  def __call__(
    self,
    latents: jax.Array,
    sigma: jax.Array,
    tokens: jax.Array,
    pooled: jax.Array | None = None,
    guidance: jax.Array | None = None,
  ) -> jax.Array:
    """Predicts noise minus data.

    Args:
      latents: [B, H, W, C]; H and W divisible by the patch size.
      sigma: [B], noise level in [0, 1]; the network's time is 1000 sigma.
      tokens: [B, L, D] text embeddings.
      pooled: [B, P] pooled text embeddings, required.
      guidance: must be None, SD3 has no such input.

    Returns:
      [B, H, W, C_out] float32.
    """
    c = self.config
    if pooled is None or guidance is not None:
      raise ValueError("SD3 needs pooled text embeddings and takes no guidance input")
    height, width = latents.shape[1] // c.patch_size, latents.shape[2] // c.patch_size
    x = PatchEmbed(c, self.dtype, name="pos_embed")(latents)
    temb = TimeTextEmbed(c.width, self.dtype, name="time_text_embed")(sigma, pooled)
    # Every adaptive norm starts with the same SiLU: once is enough.
    temb = nn.silu(temb)
    context = Dense(c.width, dtype=self.dtype, name="context_embedder")(tokens)
    carry = (x, context)
    for first, length, dual in c.runs():
      stack = stack_blocks(Block, length, scan=self.scan, remat=self.remat)
      carry, _ = stack(c, self.dtype, dual, name=f"blocks_{first}")(carry, temb)
    last = remat_block(Block, self.remat)
    dual = c.num_layers - 1 in c.dual_attention_layers
    (x, _), _ = last(c, self.dtype, dual, True, name="last_block")(carry, temb)
    scale, shift = Modulation(2, self.dtype, name="norm_out")(temb)
    x = modulate(layer_norm(x), shift, scale)
    channels = c.out_channels or c.in_channels
    features = c.patch_size**2 * channels
    x = Dense(features, dtype=self.dtype, kernel_init=_zeros, name="proj_out")(x)
    return unpatchify(x, height, width, c.patch_size).astype(jnp.float32)


class PatchEmbed(nn.Module):
  """Patches to tokens, plus the centre crop of a fixed position table.

  The table is a parameter because checkpoints hold it (perhaps rounded), but gets no gradient.
  """

  config: SD3Config
  dtype: Any

  @nn.compact
  def __call__(self, latents: jax.Array) -> jax.Array:
    """Maps [B, H, W, C] to [B, H / p * W / p, D]."""
    c = self.config
    size, p = c.pos_embed_max_size, c.patch_size
    _, h, w, channels = latents.shape
    if h % p or w % p or max(h, w) > size * p or channels != c.in_channels:
      raise ValueError(
        f"latents are {h} x {w} x {channels}: sides must be multiples of {p} up to {size * p},"
        f" with {c.in_channels} channels"
      )
    x = PatchProjection(c.width, p, self.dtype, name="proj")(latents)
    table = self.param(
      "pos_embed",
      lambda _, shape: sincos_table(size, c.sample_size // p, shape[-1]),
      (1, size * size, c.width),
    )
    h, w = h // p, w // p
    top, left = (size - h) // 2, (size - w) // 2
    table = jax.lax.stop_gradient(table).reshape(size, size, c.width)
    crop = table[top : top + h, left : left + w].reshape(1, h * w, c.width)
    return x + crop.astype(self.dtype)


class PatchProjection(nn.Module):
  """A convolution whose stride is its window, computed as one matrix product."""

  features: int
  patch: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, H, W, C] to [B, H / p * W / p, features]."""
    b, h, w, c = x.shape
    p = self.patch
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (p, p, c, self.features))
    bias = self.param("bias", _zeros, (self.features,))
    x = x.astype(self.dtype).reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3)
    x = x.reshape(b, (h // p) * (w // p), p * p * c)
    return x @ kernel.reshape(-1, self.features).astype(self.dtype) + bias.astype(self.dtype)


def unpatchify(x: jax.Array, height: int, width: int, patch: int) -> jax.Array:
  """Maps [B, height * width, patch * patch * C] to [B, height * patch, width * patch, C]."""
  b = x.shape[0]
  x = x.reshape(b, height, width, patch, patch, -1).swapaxes(2, 3)
  return x.reshape(b, height * patch, width * patch, -1)


class TimeTextEmbed(nn.Module):
  """Sum of the embedded time and the embedded pooled text."""

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, sigma: jax.Array, pooled: jax.Array) -> jax.Array:
    """Maps sigma [B] and pooled [B, P] to [B, features]."""
    time = timestep_embedding(1000.0 * sigma.astype(jnp.float32))
    time = Perceptron(self.features, self.dtype, name="timestep_embedder")(time)
    return time + Perceptron(self.features, self.dtype, name="text_embedder")(pooled)


class Perceptron(nn.Module):
  """Dense, SiLU, dense."""

  features: int
  dtype: Any
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., D_in] to [..., features]."""
    x = nn.silu(Dense(self.features, self.use_bias, self.dtype, name="linear_1")(x))
    return Dense(self.features, self.use_bias, self.dtype, name="linear_2")(x)


class Modulation(nn.Module):
  """Shifts, scales and gates of one adaptive norm; zero at the start of training."""

  parts: int
  dtype: Any
  use_bias: bool = True

  @nn.compact
  def __call__(self, temb: jax.Array) -> list[jax.Array]:
    """Maps activated [B, D] to `parts` arrays [B, 1, D]."""
    features = self.parts * temb.shape[-1]
    out = Dense(features, self.use_bias, self.dtype, kernel_init=_zeros, name="linear")(temb)
    return jnp.split(out[:, None], self.parts, axis=-1)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """`x (1 + scale) + shift` for x [B, L, D] and [B, 1, D]."""
  return x * (1 + scale) + shift


class Block(nn.Module):
  """One joint block; `dual` adds image-only attention (SD3.5), `last` drops the text output."""

  config: SD3Config
  dtype: Any
  dual: bool = False
  last: bool = False

  @nn.compact
  def __call__(
    self, carry: tuple[jax.Array, jax.Array], temb: jax.Array
  ) -> tuple[tuple[jax.Array, jax.Array], None]:
    """Maps (image tokens [B, N, D], text tokens [B, L, D]) to the same, given temb [B, D]."""
    x, context = carry
    shift, scale, gate, *mlp = Modulation(9 if self.dual else 6, self.dtype, name="norm1")(temb)
    text = Modulation(2 if self.last else 6, self.dtype, name="norm1_context")(temb)
    # Published weights order the pair differently where the norm has no gate.
    text_shift, text_scale = text[1::-1] if self.last else text[:2]
    normed = layer_norm(x)
    attended, text_attended = self._attention("attn", joint=True)(
      modulate(normed, shift, scale), modulate(layer_norm(context), text_shift, text_scale)
    )
    x += gate * attended
    if self.dual:
      shift2, scale2, gate2 = mlp[3:]
      attended, _ = self._attention("attn2", joint=False)(modulate(normed, shift2, scale2), None)
      x += gate2 * attended
    x = self._feed_forward("ff", x, *mlp[:3])
    if not self.last:
      context += text[2] * text_attended
      context = self._feed_forward("ff_context", context, *text[3:])
    return (x, context), None

  def _attention(self, name: str, *, joint: bool) -> nn.Module:
    c = self.config
    return Attention(
      c.num_attention_heads,
      c.attention_head_dim,
      c.qk_norm is not None,
      joint and not self.last,
      self.dtype,
      name=name,
    )

  def _feed_forward(
    self, name: str, x: jax.Array, shift: jax.Array, scale: jax.Array, gate: jax.Array
  ) -> jax.Array:
    return x + gate * FeedForward(self.dtype, name=name)(modulate(layer_norm(x), shift, scale))


class FeedForward(nn.Module):
  """Dense to four times the width, tanh-approximated GELU, dense back."""

  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, L, D] to [B, L, D]."""
    y = Dense(4 * x.shape[-1], dtype=self.dtype, name="net_0_proj")(x)
    return Dense(x.shape[-1], dtype=self.dtype, name="net_2")(nn.gelu(y, approximate=True))


class Attention(nn.Module):
  """Self-attention of image tokens, or of image and text tokens with projections of their own."""

  heads: int
  head_dim: int
  qk_norm: bool
  text_out: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Maps x [B, N, D] and context [B, L, D] to the same; context out only if `text_out`."""
    n, features = x.shape[1], x.shape[2]
    q, k, v = self._heads(x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
    if context is not None:
      names = ("add_q_proj", "add_k_proj", "add_v_proj")
      added = self._heads(context, names, ("norm_added_q", "norm_added_k"))
      q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip((q, k, v), added, strict=True))
    y = attention(q, k, v)
    y = y.reshape(*y.shape[:2], features)
    x_out = Dense(features, dtype=self.dtype, name="to_out_0")(y[:, :n])
    if not self.text_out:
      return x_out, None
    return x_out, Dense(features, dtype=self.dtype, name="to_add_out")(y[:, n:])

  def _heads(
    self, x: jax.Array, names: tuple[str, str, str], norms: tuple[str, str]
  ) -> list[jax.Array]:
    """Projects [B, L, D] to query, key and value [B, L, H, D / H]."""
    width = self.heads * self.head_dim
    qkv = [Dense(width, dtype=self.dtype, name=name)(x) for name in names]
    qkv = [y.reshape(*x.shape[:2], self.heads, self.head_dim) for y in qkv]
    if self.qk_norm:
      qkv[:2] = [RMSNorm(dtype=self.dtype, name=n)(y) for n, y in zip(norms, qkv[:2], strict=True)]
    return qkv
