import jax
import pytest

from rtdmd_jax.runtime.compilation import enable_compilation_cache


@pytest.mark.parametrize(
  "backend, before, after",
  [("tpu", None, "compiled"), ("cpu", None, None), ("gpu", "elsewhere", "elsewhere")],
)
def test_programs_are_kept_in_the_workdir(tmp_path, monkeypatch, backend, before, after):
  old = jax.config.jax_compilation_cache_dir
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  try:
    jax.config.update("jax_compilation_cache_dir", before)
    enable_compilation_cache(tmp_path)
    found = jax.config.jax_compilation_cache_dir
    assert found == (str(tmp_path / after) if after == "compiled" else after)
  finally:
    jax.config.update("jax_compilation_cache_dir", old)
