from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from rtdmd_jax.errors import EXIT_NUMBERS, Stopped
from rtdmd_jax.skips import Skips, scalars

STATE = SimpleNamespace(
  generator={"block": {"to_q": {"a": jnp.ones(1), "b": jnp.ones(1)}}}, fake_score={"a": jnp.ones(1)}
)


def metrics(generator, fake_score=0.0, loss=1.0):
  return {
    "generator/skipped": jnp.array(generator),
    "generator/finite": jnp.array([True, not generator]),
    "fake_score/skipped": jnp.array(fake_score),
    "fake_score/finite": jnp.array([not fake_score]),
    "loss/policy": jnp.array(loss),
  }


def test_skipped_updates_in_a_row_end_the_run(capsys):
  skips = Skips(2, STATE)
  for step, skipped in enumerate((1.0, 0.0, 1.0), 1):
    skips.follow(step, metrics(skipped))
  skips.follow(4, metrics(1.0, loss=float("nan")))
  with pytest.raises(Stopped, match=r"step 4 .* block.to_q.b, and loss/policy;") as stopped:
    skips.look()
  assert stopped.value.code == EXIT_NUMBERS
  assert skips.totals() == {"generator/skipped_total": 3.0, "fake_score/skipped_total": 0.0}
  assert capsys.readouterr().out.count("was skipped") == 3


def test_networks_are_counted_apart():
  skips = Skips(2, STATE)
  for step in range(1, 6):
    # Stage 1 does not update the generator in every step.
    values = metrics(1.0 if step == 2 else 0.0, float(step % 2))
    if step == 3:
      values = {name: value for name, value in values.items() if "generator" not in name}
    skips.follow(step, values)
  skips.look()
  skips.look()
  assert skips.totals() == {"generator/skipped_total": 1.0, "fake_score/skipped_total": 3.0}


def test_scalars_leave_vectors_out():
  assert scalars(metrics(0.0)).keys() == {
    "generator/skipped", "fake_score/skipped", "loss/policy"
  }  # fmt: skip
