"""What every transformer family hands to the rest of the program."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import flax.linen as nn
import jax

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.attention import attention_kernel
from rtdmd_jax.weights.maps import KeyTable


@dataclass(frozen=True)
class Transformer:
  """A velocity network without its parameters.

  Attributes:
    config: the family's frozen config.
    module: Flax module called as `(latents, sigma, tokens, pooled, guidance)`.
    table: maps its parameters to the family's checkpoint keys.
    example: the smallest valid inputs, as `jax.ShapeDtypeStruct`s (None for an input not used);
      sides of valid latents are multiples of those of the first.
    max_side: the longest side of valid latents, where positions come from a table; else None.
    attention: a name in `attention.KERNELS`.
  """

  config: Any
  module: nn.Module
  table: KeyTable
  example: tuple[Any, ...]
  max_side: int | None = None
  attention: str = "auto"

  @property
  def embedded_guidance(self) -> bool:
    """Whether the guidance scale is an input of the network."""
    return self.example[4] is not None

  def init(self, key: jax.Array) -> Any:
    """Fresh float32 parameters."""
    inputs = jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), self.example)
    return jax.jit(self.module.init)(key, *inputs)["params"]

  def init_abstract(self) -> Any:
    """Shapes of the parameters; allocates nothing."""
    return jax.eval_shape(self.init, jax.random.key(0))

  def apply(
    self,
    variables: Mapping[str, Any],
    latents: jax.Array,
    sigma: jax.Array,
    tokens: jax.Array,
    pooled: jax.Array | None = None,
    guidance: jax.Array | None = None,
  ) -> jax.Array:
    """Velocity with adapters.

    Args:
      variables: `{"params": ..., "lora_frozen": ..., "lora": ...}`, the last two optional.
      latents: [B, H, W, C].
      sigma: [B], noise level in [0, 1].
      tokens: [B, L, D], text embeddings.
      pooled: [B, P], for families that take pooled text embeddings.
      guidance: [B], for families that take the guidance scale as an input.

    Returns:
      [B, H, W, C] float32.
    """
    with attention_kernel(self.attention):
      return self.module.apply(variables, latents, sigma, tokens, pooled, guidance)

  def velocity(
    self,
    params: Any,
    latents: jax.Array,
    sigma: jax.Array,
    tokens: jax.Array,
    pooled: jax.Array | None = None,
    guidance: jax.Array | None = None,
  ) -> jax.Array:
    """Velocity of the base parameters alone; see `apply`."""
    return self.apply({"params": params}, latents, sigma, tokens, pooled, guidance)


def config_values(cls: type, class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a diffusers config.json; keys with a leading underscore are its own notes.

  Args:
    cls: the family's frozen dataclass.
    class_name: what `_class_name` must be.
    config: contents of config.json.

  Raises:
    UserError: another class name, or a key that the dataclass lacks.
  """
  if config.get("_class_name") != class_name:
    raise UserError(f"_class_name is {config.get('_class_name')!r}, expected {class_name!r}.")
  values = {k: v for k, v in config.items() if not k.startswith("_")}
  unknown = sorted(values.keys() - {f.name for f in fields(cls)})
  if unknown:
    raise UserError(f"{class_name} config has an unknown key {unknown[0]!r}.")
  return values
