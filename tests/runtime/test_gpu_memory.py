"""How much of a GPU a run takes."""

import pytest

from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime import gpu_memory


@pytest.fixture(autouse=True)
def unset(monkeypatch):
  for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
    monkeypatch.setenv(name, "")


def test_a_run_takes_more_than_jaxs_default(monkeypatch):
  gpu_memory.claim()
  assert gpu_memory.os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.92"


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_the_users_part_stands_alone(name, monkeypatch):
  monkeypatch.setenv(name, "0.5")
  gpu_memory.claim()
  assert gpu_memory.fraction() == 0.5
  # jax refuses to start with both of them.
  assert (
    sum(bool(gpu_memory.os.environ[n]) for n in (gpu_memory.VARIABLE, gpu_memory._OLD_VARIABLE))
    == 1
  )


@pytest.mark.parametrize("text", ["much", "0", "1.5", "nan"])
def test_another_part_is_a_mistake(text, monkeypatch):
  monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", text)
  with pytest.raises(UserError, match=f"XLA_CLIENT_MEM_FRACTION is '{text}'; set a part"):
    gpu_memory.claim()
