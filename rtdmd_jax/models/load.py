"""Transformers by the class name in their config.json."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from rtdmd_jax.errors import UserError
from rtdmd_jax.models import flux1, flux2, sd3
from rtdmd_jax.models.attention import KERNELS
from rtdmd_jax.models.network import in_dtype
from rtdmd_jax.models.stack import REMAT_POLICIES
from rtdmd_jax.models.transformer import Transformer
from rtdmd_jax.runtime import sharding
from rtdmd_jax.weights.safetensors import load_params, read_config

# Builders take (config dict, dtype=, scan=, remat=).
FAMILIES: dict[str, Callable[..., Transformer]] = {
  sd3.CLASS_NAME: sd3.build,
  flux1.CLASS_NAME: flux1.build,
  flux2.CLASS_NAME: flux2.build,
}


def build_transformer(
  config: Mapping[str, Any],
  *,
  dtype: Any = jnp.float32,
  scan: bool = True,
  remat: str = "none",
  attention: str = "auto",
) -> Transformer:
  """Builds the network that a diffusers config describes.

  Args:
    config: contents of config.json; `_class_name` chooses the family.
    dtype: type of the computation; parameters may have another.
    scan: keep the loop over identical blocks a loop; False unrolls it. Same parameters either way.
    remat: "none", "full" or "dots", what the backward pass recomputes of each block.
    attention: "auto" (the platform's kernel), "xla", "splash" (TPU) or "cudnn" (GPU).

  Raises:
    UserError: unknown class name, `remat` or `attention`, or a config that the family does not
      know.
  """
  if remat not in REMAT_POLICIES:
    raise UserError(f"remat is {remat!r}; choose one of {', '.join(REMAT_POLICIES)}.")
  if attention not in KERNELS:
    raise UserError(f"attention is {attention!r}; choose one of {', '.join(KERNELS)}.")
  name = config.get("_class_name")
  if not isinstance(name, str) or name not in FAMILIES:
    raise UserError(f"_class_name is {name!r}; known transformers are {', '.join(FAMILIES)}.")
  built = FAMILIES[name](config, dtype=dtype, scan=scan, remat=remat)
  return replace(built, attention=attention)


def base_shapes(transformer: Transformer, dtype: Any, storage: str = "native") -> Any:
  """Shapes of a frozen base's parameters as a run keeps them.

  Args:
    transformer: the network.
    dtype: of floating-point parameters.
    storage: a name in `weights.int8.STORAGES`.

  Raises:
    UserError: see `Transformer.stored`.
  """
  return transformer.stored(in_dtype(transformer.init_abstract(), dtype), storage)


def load_base(
  path: str | os.PathLike,
  transformer: Transformer,
  *,
  dtype: Any,
  storage: str = "native",
  offload: bool = False,
) -> Any:
  """Parameters of a frozen base, with the shapes and types of `base_shapes`.

  Args:
    path: a `transformer/` directory or a file.
    transformer: the network.
    dtype: of floating-point parameters.
    storage: a name in `weights.int8.STORAGES`.
    offload: the blocks' kernels stay in the memory of the hosts; needs a mesh.

  Raises:
    UserError: missing or broken files, or keys that do not fit.
    ValueError: offloading without a mesh.
  """
  shapes = base_shapes(transformer, dtype, storage)
  mesh = sharding.current()
  if offload and mesh is None:
    raise ValueError("offloading needs a mesh: jax.set_mesh, or Pipeline.from_pretrained(mesh=...)")
  where = sharding.shardings(shapes, mesh, offload=True) if offload else None
  return load_params(path, shapes, transformer.table, sharding=where)


def load_transformer(
  directory: str | os.PathLike, *, dtype: Any = jnp.float32
) -> tuple[Callable[..., Any], Any]:
  """Loads a diffusers `transformer/` directory of any family.

  Args:
    directory: holds config.json and the safetensors weights.
    dtype: type of the computation and of the parameters.

  Returns:
    (velocity, params), where `velocity(params, latents [B, H, W, C], sigma [B], tokens [B, L, D],
    pooled [B, P] | None, guidance [B] | None)` is the velocity, [B, H, W, C] float32.

  Raises:
    UserError: missing or broken files, unknown family, or keys that do not fit.
  """
  transformer = build_transformer(read_config(directory), dtype=dtype)
  return transformer.velocity, load_base(directory, transformer, dtype=dtype)
