"""Whatever is handed over, a refusal is one sentence and nothing else is ever raised."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.support.bad_inputs import SURFACES, outcome, service


@pytest.fixture(scope="module", autouse=True)
def reward_service():
  with service():
    yield


@pytest.mark.parametrize("surface", SURFACES, ids=lambda surface: surface.name)
def test_bad_input_is_one_sentence(surface):
  with tempfile.TemporaryDirectory() as folder:
    assert outcome(surface, Path(folder), surface.sound) == "accepted"
  outcomes = []

  @settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
  )
  @given(surface.cases)
  def attempt(case):
    with tempfile.TemporaryDirectory() as folder:
      outcomes.append(outcome(surface, Path(folder), case))

  attempt()
  assert outcomes.count("refused") >= 5  # the cases are bad indeed
