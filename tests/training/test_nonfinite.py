from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from rtdmd_jax.errors import EXIT_NUMBERS, Stopped
from rtdmd_jax.training.nonfinite import NETWORKS, NonFiniteGuard, scalars

STATE = SimpleNamespace(
  generator={"block": {"to_q": {"a": jnp.ones(1), "b": jnp.ones(1)}}}, fake_score={"a": jnp.ones(1)}
)


def metrics(generator, fake_score=0.0, loss=1.0, norm=1.0):
  norms = {
    f"{n}/{kind}": jnp.array(norm) for n in NETWORKS for kind in ("grad_norm", "update_norm")
  }
  return norms | {
    "generator/skipped": jnp.array(generator),
    "generator/finite": jnp.array([True, not generator]),
    "fake_score/skipped": jnp.array(fake_score),
    "fake_score/finite": jnp.array([not fake_score]),
    "loss/policy": jnp.array(loss),
  }


def test_skipped_updates_in_a_row_end_the_run(capsys):
  guard = NonFiniteGuard(2, STATE)
  for step, skipped in enumerate((1.0, 0.0, 1.0), 1):
    guard.observe(step, metrics(skipped))
  guard.observe(4, metrics(1.0, loss=float("nan")))
  with pytest.raises(Stopped, match=r"step 4 .* block.to_q.b, and loss/policy;") as stopped:
    guard.flush()
  assert stopped.value.code == EXIT_NUMBERS
  assert guard.totals() == {"generator/skipped_total": 3.0, "fake_score/skipped_total": 0.0}
  assert capsys.readouterr().out.count("was skipped") == 3


def test_networks_are_counted_apart():
  guard = NonFiniteGuard(2, STATE)
  for step in range(1, 6):
    # Stage 1 does not update the generator in every step.
    values = metrics(1.0 if step == 2 else 0.0, float(step % 2))
    if step == 3:
      values = {name: value for name, value in values.items() if "generator" not in name}
    guard.observe(step, values)
  guard.flush()
  guard.flush()
  assert guard.totals() == {"generator/skipped_total": 1.0, "fake_score/skipped_total": 3.0}


def test_scalars_leave_vectors_out():
  vectors = {"generator/finite", "fake_score/finite"}
  assert scalars(metrics(0.0)).keys() == metrics(0.0).keys() - vectors


def test_updates_that_change_nothing_are_said_once(capsys):
  guard = NonFiniteGuard(2, STATE)
  for step in range(1, 25):
    guard.observe(step, metrics(0.0, norm=0.0))
  guard.finish()
  said = capsys.readouterr().out
  assert said.count("the last 10 updates of generator changed nothing") == 1
  assert said.count("warning") == 2  # one a network


def test_a_short_run_whose_updates_change_nothing_says_so_at_its_end(capsys):
  guard = NonFiniteGuard(2, STATE)
  for step in range(1, 4):
    guard.observe(step, metrics(0.0, norm=0.0))
  guard.finish()
  assert "the last 3 updates of generator changed nothing" in capsys.readouterr().out


def test_a_run_whose_every_update_was_skipped_ends_with_an_exit_code_of_its_own():
  guard = NonFiniteGuard(20, STATE)
  for step in range(1, 4):
    guard.observe(step, metrics(1.0))
  with pytest.raises(Stopped, match="every update of generator .3. was skipped") as stopped:
    guard.finish()
  assert stopped.value.code == EXIT_NUMBERS


def test_counts_go_on_where_a_checkpoint_left_them():
  first = NonFiniteGuard(20, STATE)
  first.observe(1, metrics(1.0))
  first.flush()
  later = NonFiniteGuard(20, STATE, first.counts())
  later.observe(2, metrics(0.0))
  later.finish()
  assert later.totals()["generator/skipped_total"] == 1 and later.counts()["generator"] == (2, 1)
