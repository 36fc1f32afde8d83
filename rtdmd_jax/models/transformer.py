"""The interface of a transformer family."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args, get_origin, get_type_hints

import flax.linen as nn
import jax
import jax.numpy as jnp

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.attention import attention_kernel
from rtdmd_jax.models.network import init_shapes
from rtdmd_jax.weights.int8 import STORAGES, int8_shapes
from rtdmd_jax.weights.key_table import KeyTable

_LARGEST_SIZE = 2**31 - 1


@dataclass(frozen=True)
class OtherNames:
  """The names that a family has in other programs; those of layers are regular expressions.

  Attributes:
    pipeline: the class of the family's pipeline in diffusers.
    transformer: the class of its transformer there.
    first_release: (diffusers' module, the first release's module). `#n` numbers the parts of a
      fused projection, `~` marks rows whose halves are swapped.
    of_first_release: further names of first-release modules, each of their first three parts.
    of_diffusers: further names of diffusers' modules.
  """

  pipeline: str
  transformer: str
  first_release: tuple[tuple[str, str], ...]
  of_first_release: tuple[tuple[str, str], ...] = ()
  of_diffusers: tuple[tuple[str, str], ...] = ()


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
    names: the names that its dense layers have in adapter files.
  """

  config: Any
  module: nn.Module
  table: KeyTable
  example: tuple[Any, ...]
  max_side: int | None = None
  attention: str = "auto"
  names: OtherNames = OtherNames("", "", ())

  @property
  def embedded_guidance(self) -> bool:
    """Whether the guidance scale is an input of the network."""
    return self.example[4] is not None

  def init(self, key: jax.Array) -> Any:
    """Fresh float32 parameters."""
    inputs = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.example)
    return jax.jit(self.module.init)(key, *inputs)["params"]

  def init_abstract(self) -> Any:
    """Shapes of the parameters; allocates nothing."""
    return init_shapes(self.module, *self.example)

  def stored(self, abstract_params: Any, storage: str) -> Any:
    """Shapes of parameters as a run keeps them, given those of `init_abstract` in any type.

    Args:
      abstract_params: what "native" storage keeps.
      storage: a name in `weights.int8.STORAGES`.

    Raises:
      UserError: an unknown name, or int8 for a computation in float16.
    """
    if storage not in STORAGES:
      raise UserError(f"base_storage is {storage!r}; choose one of {', '.join(STORAGES)}.")
    if storage == "native":
      return abstract_params
    if jnp.dtype(self.module.dtype) == jnp.float16:
      # Before their scale is applied, products are some hundred times as large.
      raise UserError(
        "model.base_storage is 'int8' and model.dtype is 'float16', in which its products"
        " overflow; use bfloat16 or float32."
      )
    return int8_shapes(abstract_params, self.table)

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
  """The fields of a diffusers config.json, lists as tuples.

  Keys with a leading underscore are diffusers' own notes.

  Args:
    cls: the family's frozen dataclass.
    class_name: what `_class_name` must be.
    config: contents of config.json.

  Raises:
    UserError: another class name, a key that the dataclass lacks, or a value of another type.
  """
  if config.get("_class_name") != class_name:
    raise UserError(f"_class_name is {config.get('_class_name')!r}, expected {class_name!r}.")
  values = {
    k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if not k.startswith("_")
  }
  unknown = sorted(values.keys() - {f.name for f in fields(cls)})
  if unknown:
    raise UserError(f"{class_name} config has an unknown key {unknown[0]!r}.")
  check_types(class_name, cls, values)
  return values


def check_types(what: str, cls: type, values: Mapping[str, Any]) -> None:
  """Raises UserError for a value of another type than its field of the dataclass `cls`.

  Args:
    what: the model, for the message.
    cls: the dataclass; integers of it are positive.
    values: by the names of its fields.
  """
  hints = get_type_hints(cls)
  for name, value in values.items():
    if not _is_of(value, hints[name]):
      shown = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
      raise UserError(f"{what} config: {name} is {_short(value)}, expected {shown}.")


def example_inputs(
  latents: tuple[int, int, int], tokens: int, pooled: int | None = None, *, guidance: bool = False
) -> tuple[Any, ...]:
  """`Transformer.example` for one image and one token.

  Args:
    latents: the smallest height and width, and the channels.
    tokens: features of a text token.
    pooled: features of the pooled text; None where it is not an input.
    guidance: whether the guidance scale is an input.
  """
  shapes = (
    (1, *latents),
    (1,),
    (1, 1, tokens),
    None if pooled is None else (1, pooled),
    (1,) if guidance else None,
  )
  return tuple(s and jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)


def _is_of(value: Any, hint: Any) -> bool:
  """Whether a JSON value fits a field's type; sizes are positive, and a list may be a tuple."""
  if get_origin(hint) is tuple:
    item = get_args(hint)[0]
    return isinstance(value, list | tuple) and all(
      isinstance(v, item) and not isinstance(v, bool) for v in value
    )
  if args := get_args(hint):
    return any(_is_of(value, arg) for arg in args)
  if hint is int:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST_SIZE
  if hint is float:
    return isinstance(value, int | float) and abs(value) < math.inf and not isinstance(value, bool)
  return isinstance(value, hint)


def _short(value: Any) -> str:
  return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."
