from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime.profiling import profiled


def section(start, count, steps=6):
  return SimpleNamespace(profile_start=start, profile_steps=count, steps=steps)


def add(state, batch, prompts, number):
  return state + batch, {"number": number}


def run(step, first=0, last=6):
  state = jnp.zeros(())
  for number in range(first, last):
    state, _ = step(state, 1.0, [], number)
  return float(state)


@pytest.fixture
def calls(monkeypatch):
  """Starts and stops of the profiler, and the steps between them."""
  seen = []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: seen.append(str(folder)))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))

  def step(state, batch, prompts, number):
    seen.append(number + 1)
    return add(state, batch, prompts, number)

  return step, seen


def test_a_trace_is_written(tmp_path, capsys):
  assert run(profiled(add, section(3, 2), tmp_path)) == 6.0
  (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
  assert trace.stat().st_size > 1000
  assert "profile of steps 3 to 4" in capsys.readouterr().out


def test_the_window_holds_its_steps_alone(tmp_path, calls):
  step, seen = calls
  run(profiled(step, section(3, 2), tmp_path))
  assert seen == [1, 2, str(tmp_path / "profile"), 3, 4, "stop", 5, 6]


def test_a_run_that_starts_inside_the_window(tmp_path, calls):
  step, seen = calls
  run(profiled(step, section(3, 3), tmp_path), first=3)
  assert seen == [str(tmp_path / "profile"), 4, 5, "stop", 6]


def test_no_window(tmp_path):
  assert profiled(add, section(10, 0), tmp_path) is add


@pytest.mark.parametrize("start, count", [(0, 2), (6, 2), (3, -1)])
def test_windows_outside_the_run(tmp_path, start, count):
  with pytest.raises(UserError, match="must lie within the 6 steps"):
    profiled(add, section(start, count), tmp_path)
