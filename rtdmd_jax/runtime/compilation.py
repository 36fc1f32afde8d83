"""Compilation of programs, and their cache between starts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from rtdmd_jax.runtime.sharding import platform

FOLDER = "compiled"
# By default a product with a split weight becomes a ring that works on a part of the weight at a
# time, which multiplies memory traffic (docs/hardware.md): gather the weight instead.
_OPTIONS = {"tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}}


def jit(function: Callable, **options: Any) -> Callable:
  """`jax.jit(function, **options)` with the compiler's options for the current mesh's platform."""
  return jax.jit(function, compiler_options=_OPTIONS.get(platform()), **options)


def enable_compilation_cache(workdir: Path) -> None:
  """Keeps what is compiled from now on in `workdir/compiled`, from where a later start loads it.

  `JAX_COMPILATION_CACHE_DIR` names another place. Programs for a CPU are kept only if it is set:
  they are made for one machine's processor, and a workdir may move to another one.
  """
  folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
  if folder is None and jax.default_backend() != "cpu":
    jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / FOLDER))
