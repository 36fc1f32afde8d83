"""Where compiled programs are kept between starts."""

from pathlib import Path

import jax

FOLDER = "compiled"


def keep_programs(workdir: Path) -> None:
  """Keeps what is compiled from now on in `workdir/compiled`, from where a later start loads it.

  `JAX_COMPILATION_CACHE_DIR` names another place. Programs for a CPU are kept only if it is set:
  they are made for one machine's processor, and a workdir may move to another one.
  """
  if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != "cpu":
    jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / FOLDER))
