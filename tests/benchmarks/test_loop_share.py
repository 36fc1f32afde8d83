"""The yardstick of benchmarks/loop_share.py."""

import pytest

from benchmarks import loop_share


def test_gaps_are_what_no_program_covers():
  spans = [
    loop_share.Span("rollout", 0.0, 2.0),
    loop_share.Span("policy", 5.5, 8.0),
    loop_share.Span("fake_score", 1.0, 5.0),  # overlaps, and comes in another order
    loop_share.Span("rollout", 8.25, 9.0),
    loop_share.Span("fake_score", 8.5, 8.75),  # inside another one
  ]
  total, found = loop_share.gaps(spans)
  assert total == 9.0
  assert found == {"fake_score to policy": 0.5, "policy to rollout": pytest.approx(0.25)}
