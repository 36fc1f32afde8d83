"""CLIP text and vision towers (arXiv 2103.00020), with the names of transformers' checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.attention import attention
from rtdmd_jax.models.layers import Dense
from rtdmd_jax.models.stack import stack_blocks
from rtdmd_jax.weights.maps import KeyTable, Stack

TEXT_TABLE = KeyTable(stacks=[Stack("text_model.layers", "text_model.encoder.layers")])
CLIP_TABLE = KeyTable(
  stacks=[
    Stack("text_model.layers", "text_model.encoder.layers"),
    Stack("vision_model.layers", "vision_model.encoder.layers"),
  ]
)
_ACTIVATIONS = {
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
  "gelu": lambda x: nn.gelu(x, approximate=False),
}


@dataclass(frozen=True)
class TowerConfig:
  """The fields of a text or vision config.json that shape the computation."""

  hidden_size: int = 512
  intermediate_size: int = 2048
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  projection_dim: int = 512
  # Text.
  vocab_size: int = 49408
  max_position_embeddings: int = 77
  eos_token_id: int = 49407
  # Vision.
  image_size: int = 224
  patch_size: int = 32

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "TowerConfig":
    """Reads a tower's config; other fields (dropout, initialisers) are transformers' own.

    Raises:
      UserError: an activation that is not supported.
    """
    values = {f.name: config[f.name] for f in fields(cls) if f.name in config}
    built = cls(**values)
    if built.hidden_act not in _ACTIVATIONS:
      raise UserError(
        f"hidden_act is {built.hidden_act!r}, expected one of {', '.join(_ACTIVATIONS)}."
      )
    return built


@dataclass(frozen=True)
class CLIPConfig:
  """Both towers of a `CLIPModel`."""

  text: TowerConfig
  vision: TowerConfig
  projection_dim: int

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "CLIPConfig":
    """Reads a `CLIPModel` config.json.

    Raises:
      UserError: a tower's config is missing or not supported.
    """
    for key in ("text_config", "vision_config"):
      if key not in config:
        raise UserError(f"config.json of a CLIPModel needs {key!r}.")
    # CLIPConfig's default for the shared space, where a checkpoint omits it.
    projection = config.get("projection_dim", 512)
    text, vision = (
      TowerConfig.from_dict({**config[k], "projection_dim": projection})
      for k in ("text_config", "vision_config")
    )
    return cls(text, vision, projection)


class Layer(nn.Module):
  """Pre-norm transformer layer; `causal` for text."""

  config: TowerConfig
  causal: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
    """Maps [B, L, D] to the same shape."""
    c = self.config
    x = x + SelfAttention(c.num_attention_heads, self.causal, self.dtype, name="self_attn")(
      _norm(c, self.dtype, "layer_norm1")(x)
    )
    return x + MLP(c, self.dtype, name="mlp")(_norm(c, self.dtype, "layer_norm2")(x)), None


class SelfAttention(nn.Module):
  """Multi-head attention; the head size is the width over the heads."""

  heads: int
  causal: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, L, D] to the same shape."""
    b, length, features = x.shape
    q, k, v = (
      Dense(features, dtype=self.dtype, name=name)(x).reshape(b, length, self.heads, -1)
      for name in ("q_proj", "k_proj", "v_proj")
    )
    mask = jnp.tril(jnp.ones((1, 1, length, length), bool)) if self.causal else None
    y = attention(q, k, v, mask).reshape(x.shape)
    return Dense(features, dtype=self.dtype, name="out_proj")(y)


class MLP(nn.Module):
  """Dense, activation, dense."""

  config: TowerConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, L, D] to the same shape."""
    c = self.config
    y = Dense(c.intermediate_size, dtype=self.dtype, name="fc1")(x)
    return Dense(c.hidden_size, dtype=self.dtype, name="fc2")(_ACTIVATIONS[c.hidden_act](y))


def _norm(config: TowerConfig, dtype: Any, name: str) -> nn.LayerNorm:
  return nn.LayerNorm(config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name)


class TextEmbeddings(nn.Module):
  """Token plus position embeddings."""

  config: TowerConfig
  dtype: Any

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    """Maps ids [B, L] to [B, L, D]."""
    c = self.config
    tokens = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, name="token_embedding")(ids)
    positions = nn.Embed(
      c.max_position_embeddings, c.hidden_size, dtype=self.dtype, name="position_embedding"
    )
    return tokens + positions(jnp.arange(ids.shape[1]))


class TextTower(nn.Module):
  """Transformer over tokens."""

  config: TowerConfig
  dtype: Any

  @nn.compact
  def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maps ids [B, L] to (input of the last layer [B, L, D], pooled final state [B, D])."""
    c = self.config
    x = TextEmbeddings(c, self.dtype, name="embeddings")(ids)
    # All but the last layer, so that the penultimate states that SD3 reads are at hand.
    stack = stack_blocks(LayerWithInput, c.num_hidden_layers, scan=True, remat="none")
    (x, penultimate), _ = stack(c, True, self.dtype, name="layers")((x, x))
    x = _norm(c, self.dtype, "final_layer_norm")(x)
    return penultimate, x[jnp.arange(ids.shape[0]), end_of_text(ids, c.eos_token_id)]


class LayerWithInput(Layer):
  """A layer that also hands on its input, so that the stack's output has the last layer's."""

  @nn.compact
  def __call__(self, carry: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
    """Maps (x, anything) to (layer of x, x)."""
    y, _ = super().__call__(carry[0])
    return (y, carry[0]), None


def end_of_text(ids: jax.Array, eos_token_id: int) -> jax.Array:
  """Position [B] of the pooled token of ids [B, L].

  The first end token; configs written before it was recorded say 2, where the largest id is it.
  """
  if eos_token_id == 2:
    return jnp.argmax(ids, axis=1)
  return jnp.argmax(ids == eos_token_id, axis=1)


class VisionTower(nn.Module):
  """Transformer over image patches and a class token."""

  config: TowerConfig
  dtype: Any

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """Maps normalised pixels [B, H, W, 3] to the pooled class token [B, D]."""
    c = self.config
    x = VisionEmbeddings(c, self.dtype, name="embeddings")(pixels)
    x = _norm(c, self.dtype, "pre_layrnorm")(x)
    stack = stack_blocks(Layer, c.num_hidden_layers, scan=True, remat="none")
    x, _ = stack(c, False, self.dtype, name="layers")(x)
    return _norm(c, self.dtype, "post_layernorm")(x[:, 0])


class VisionEmbeddings(nn.Module):
  """Patch and class embeddings plus learned positions."""

  config: TowerConfig
  dtype: Any

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """Maps [B, H, W, 3] to [B, 1 + patches, D]."""
    c = self.config
    if pixels.shape[1:3] != (c.image_size, c.image_size):
      raise ValueError(f"pixels {pixels.shape}: expected sides of {c.image_size}")
    size = (c.patch_size, c.patch_size)
    patches = nn.Conv(
      c.hidden_size, size, size, "VALID", use_bias=False, dtype=self.dtype, name="patch_embedding"
    )(pixels)
    patches = patches.reshape(pixels.shape[0], -1, c.hidden_size)
    token = self.param("class_embedding", nn.initializers.normal(0.02), (c.hidden_size,))
    token = jnp.broadcast_to(token.astype(self.dtype), (pixels.shape[0], 1, c.hidden_size))
    x = jnp.concatenate([token, patches], axis=1)
    positions = nn.Embed(x.shape[1], c.hidden_size, dtype=self.dtype, name="position_embedding")
    return x + positions(jnp.arange(x.shape[1]))


class CLIPText(nn.Module):
  """transformers' `CLIPTextModelWithProjection`, or `CLIPTextModel` without the projection."""

  config: TowerConfig
  dtype: Any = jnp.float32
  project: bool = True

  @nn.compact
  def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maps ids [B, L] to (penultimate states [B, L, D], pooled [B, P], not normalised)."""
    hidden, pooled = TextTower(self.config, self.dtype, name="text_model")(ids)
    if self.project:
      pooled = Dense(
        self.config.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection"
      )(pooled)
    return hidden, pooled


class CLIP(nn.Module):
  """transformers' `CLIPModel`: both towers into one space."""

  config: CLIPConfig
  dtype: Any = jnp.float32

  def setup(self):
    c = self.config
    self.text_model = TextTower(c.text, self.dtype)
    self.vision_model = VisionTower(c.vision, self.dtype)
    self.text_projection = Dense(c.projection_dim, use_bias=False, dtype=self.dtype)
    self.visual_projection = Dense(c.projection_dim, use_bias=False, dtype=self.dtype)
    self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

  def __call__(self, ids: jax.Array, pixels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (text features [B, P], image features [B, P], exp(logit_scale) [])."""
    return self.text_features(ids), self.image_features(pixels), jnp.exp(self.logit_scale)

  def text_features(self, ids: jax.Array) -> jax.Array:
    """Unit vectors [B, P] float32 of ids [B, L]."""
    return _unit(self.text_projection(self.text_model(ids)[1]))

  def image_features(self, pixels: jax.Array) -> jax.Array:
    """Unit vectors [B, P] float32 of normalised pixels [B, H, W, 3]."""
    return _unit(self.visual_projection(self.vision_model(pixels)))


def _unit(x: jax.Array) -> jax.Array:
  x = x.astype(jnp.float32)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
