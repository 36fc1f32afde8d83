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
from rtdmd_jax.models.embeddings import sincos_table
from rtdmd_jax.models.heads import join_heads
from rtdmd_jax.models.layers import Dense
from rtdmd_jax.models.mmdit_layers import (
  RENAMES,
  FeedForward,
  Modulation,
  TimeTextEmbed,
  branch,
  modulate,
  project_heads,
  project_out,
)
from rtdmd_jax.models.norms import layer_norm
from rtdmd_jax.models.stack import remat_block, stack_blocks
from rtdmd_jax.models.transformer import OtherNames, Transformer, config_values, example_inputs
from rtdmd_jax.weights.key_table import KeyTable, Stack

CLASS_NAME = "SD3Transformer2DModel"


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
    dual = config.get("dual_attention_layers") or ()  # diffusers writes null, too
    values = config_values(cls, CLASS_NAME, {**config, "dual_attention_layers": dual})
    values["dual_attention_layers"] = tuple(dual)
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
      *RENAMES,
    ],
  )


def build(config: Mapping[str, Any], *, dtype: Any, scan: bool, remat: str) -> Transformer:
  """Builds the transformer of a config.json; see `models.build_transformer`."""
  c = SD3Config.from_dict(config)
  latents = (c.patch_size, c.patch_size, c.in_channels)
  example = example_inputs(latents, c.joint_attention_dim, c.pooled_projection_dim)
  max_side = c.pos_embed_max_size * c.patch_size
  names = OtherNames("StableDiffusion3Pipeline", CLASS_NAME, _first_release(c))
  return Transformer(c, SD3(c, dtype, scan, remat), key_table(c), example, max_side, names=names)


_BLOCK = r"transformer_blocks\.(\d+)\."


def _first_release(config: SD3Config) -> tuple[tuple[str, str], ...]:
  """The first release's names of layers."""
  last = rf"transformer_blocks\.({config.num_layers - 1})\."
  x, context = r"joint_blocks.\1.x_block.", r"joint_blocks.\1.context_block."
  return (
    *((rf"{_BLOCK}(attn2?)\.to_{c}", rf"{x}\2.qkv#{i}") for i, c in enumerate("qkv")),
    *((rf"{_BLOCK}attn\.add_{c}_proj", rf"{context}attn.qkv#{i}") for i, c in enumerate("qkv")),
    (rf"{_BLOCK}(attn2?)\.to_out\.0", rf"{x}\2.proj"),
    (rf"{_BLOCK}attn\.to_add_out", rf"{context}attn.proj"),
    (rf"{_BLOCK}ff\.net\.0\.proj", rf"{x}mlp.fc1"),
    (rf"{_BLOCK}ff\.net\.2", rf"{x}mlp.fc2"),
    (rf"{_BLOCK}ff_context\.net\.0\.proj", rf"{context}mlp.fc1"),
    (rf"{_BLOCK}ff_context\.net\.2", rf"{context}mlp.fc2"),
    (rf"{_BLOCK}norm1\.linear", rf"{x}adaLN_modulation.1"),
    # The last block's text is only attended to: two modulations, scale and shift.
    (rf"{last}norm1_context\.linear", rf"{context}adaLN_modulation.1~"),
    (rf"{_BLOCK}norm1_context\.linear", rf"{context}adaLN_modulation.1"),
    (r"time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
    (r"context_embedder", "context_embedder"),
    (r"proj_out", "final_layer.linear"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1~"),
  )


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
    features = c.patch_size**2 * (c.out_channels or c.in_channels)
    x = project_out(x, temb, features, dtype=self.dtype)
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
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    x = x.astype(self.dtype).reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3)
    x = x.reshape(b, (h // p) * (w // p), p * p * c)
    return x @ kernel.reshape(-1, self.features).astype(self.dtype) + bias.astype(self.dtype)


def unpatchify(x: jax.Array, height: int, width: int, patch: int) -> jax.Array:
  """Maps [B, height * width, patch * patch * C] to [B, height * patch, width * patch, C]."""
  b = x.shape[0]
  x = x.reshape(b, height, width, patch, patch, -1).swapaxes(2, 3)
  return x.reshape(b, height * patch, width * patch, -1)


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
    x = branch(x, FeedForward(self.dtype, name="ff"), *mlp[:3])
    if not self.last:
      context += text[2] * text_attended
      context = branch(context, FeedForward(self.dtype, name="ff_context"), *text[3:])
    return (x, context), None

  def _attention(self, name: str, *, joint: bool) -> nn.Module:
    c = self.config
    return Attention(
      c.num_attention_heads,
      c.qk_norm is not None,
      joint and not self.last,
      self.dtype,
      name=name,
    )


class Attention(nn.Module):
  """Self-attention of image tokens, or of image and text tokens with projections of their own."""

  heads: int
  qk_norm: bool
  text_out: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Maps x [B, N, D] and context [B, L, D] to the same; context out only if `text_out`."""
    n, features = x.shape[1], x.shape[2]
    q, k, v = self._project(x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
    if context is not None:
      names = ("add_q_proj", "add_k_proj", "add_v_proj")
      added = self._project(context, names, ("norm_added_q", "norm_added_k"))
      q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip((q, k, v), added, strict=True))
    y = join_heads(attention(q, k, v))
    x_out = Dense(features, dtype=self.dtype, name="to_out_0")(y[:, :n])
    if not self.text_out:
      return x_out, None
    return x_out, Dense(features, dtype=self.dtype, name="to_add_out")(y[:, n:])

  def _project(
    self, x: jax.Array, names: tuple[str, str, str], norms: tuple[str, str]
  ) -> list[jax.Array]:
    norms = norms if self.qk_norm else None
    return project_heads(x, names, norms, heads=self.heads, dtype=self.dtype)
