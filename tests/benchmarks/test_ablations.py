"""benchmarks/ablations.py: its variants are runs, its distance is one."""

import numpy as np
import pytest

from benchmarks import ablations
from rtdmd_jax.config import load_config
from rtdmd_jax.training.setup import policy_config
from rtdmd_jax.training.validate import check_limits
from tests.support.paths import ROOT


@pytest.mark.parametrize("stage", list(ablations.STAGES))
def test_every_variant_is_a_run_of_its_own(stage):
  name, common = ablations.STAGES[stage]
  seen = set()
  for overrides in ablations.VARIANTS[stage].values():
    config = load_config(str(ROOT / name), [*common, *overrides])
    check_limits(config)
    if stage == "stage2":
      policy_config(config)
    seen.add(config.to_json_best_effort())
  assert len(seen) == len(ablations.VARIANTS[stage])


def test_the_distance_of_features_grows_with_their_shift():
  random = np.random.default_rng(0)
  draw = lambda shift: _unit(random.normal(size=(400, 8)) + shift)  # noqa: E731
  same, near, far = (ablations._kid(draw(0.0), draw(shift)) for shift in (0.0, 0.3, 1.0))
  # Unbiased: of equal laws it is 0 within its error, a few thousandths here.
  assert abs(same) < 0.02 < near < far


def test_the_table_compares_seed_by_seed():
  row = lambda geneval: dict(clipscore=0.6, geneval=geneval, distance=20.0)  # noqa: E731
  rows = {
    "GRPO": {"0": row(0.2), "1": row(0.4)},
    "M = 2 and last step": {"0": row(0.3), "1": row(0.35), "2": row(0.9)},
  }
  text = ablations.table("stage2", {"stage2": rows})
  assert (
    "| GRPO | 2 | 0.600 | +0.000 (+0.000 to +0.000) | 0.300 | -0.025 (-0.100 to +0.050) |" in text
  )
  assert "| M = 2 and last step | 3 | 0.600 |  | 0.517 |  | 20.0 |  |" in text


def _unit(x):
  return x / np.linalg.norm(x, axis=1, keepdims=True)
