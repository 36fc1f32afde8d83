import jax
import jax.numpy as jnp
import pytest

from rtdmd_jax.runtime import throughput
from rtdmd_jax.runtime.checked_jit import checked_jit
from rtdmd_jax.runtime.chips import CHIPS
from rtdmd_jax.runtime.throughput import Meter, loop_turns, peak_tflops


def test_the_generators_last_step_is_outside_of_its_loop():
  assert loop_turns("fake_score", 4) == (2.5, 4)
  assert loop_turns("generator", 4) == (1.5, 3)


@pytest.mark.parametrize("check", [False, True])
def test_a_meter_adds_what_is_called_and_traces_once(check):
  traced = []

  def product(x, w):
    traced.append(None)
    return jax.lax.while_loop(lambda y: y.sum() < 0, lambda y: y @ w, x @ w)

  meter = Meter(steps=5)
  program = meter.watch({"generator": checked_jit(product, check=check)})["generator"]
  x, w = jnp.ones((3, 4)), jnp.ones((4, 4))
  for calls in (1, 2):
    assert program(x, w).tolist() == [[4.0] * 4] * 3
    assert meter.tflop == pytest.approx(calls * 3 * (2 * 3 * 4 * 4) / 1e12)
  assert len(traced) == 1


def test_peak_of_known_devices(monkeypatch):
  assert peak_tflops() is None  # a CPU's is not known
  device = type("Device", (), {"device_kind": "TPU v5 lite"})
  monkeypatch.setattr(throughput.jax, "devices", lambda: [device] * 8)
  monkeypatch.setattr(throughput.jax, "device_count", lambda: 8)
  assert peak_tflops() == pytest.approx(8 * CHIPS["TPU v5 lite"].flops / 1e12)
