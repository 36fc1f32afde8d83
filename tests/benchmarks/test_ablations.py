"""benchmarks/ablations.py: its variants are runs, its distance is one."""

import numpy as np
import pytest

from benchmarks import ablations, record, tables
from benchmarks.columns import TABLES
from rtdmd_jax.config import load_config
from rtdmd_jax.training.typed_config import policy_config
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
  row = lambda variant, seed, geneval: dict(  # noqa: E731
    stage="stage2", variant=variant, seed=seed, clipscore=0.6, geneval=geneval, distance=20.0
  )
  text = tables.render(
    TABLES["ablations_stage2"],
    [
      row("GRPO", 0, 0.2), row("GRPO", 1, 0.4), row("M = 2 and last step", 0, 0.3),
      row("M = 2 and last step", 1, 0.35), row("M = 2 and last step", 2, 0.9),
    ],
  )  # fmt: skip
  assert (
    "| GRPO | 2 | 0.600 | +0.000 (+0.000 to +0.000) | 0.300 | -0.025 (-0.100 to +0.050) |" in text
  )
  assert "| M = 2 and last step | 3 | 0.600 |  | 0.517 |  | 20.0 |  |" in text


def test_a_stored_run_is_not_run_again(tmp_path, monkeypatch):
  monkeypatch.setattr(record, "RESULTS", tmp_path)
  done = []
  scores = dict(clipscore=0.6, geneval=0.2, distance=20.0)
  monkeypatch.setattr(ablations, "run", lambda *place: done.append(place) or scores)
  for seeds in (["0"], ["0", "1"]):
    monkeypatch.setattr("sys.argv", ["ablations", "--only=stage1", "--seeds", *seeds])
    ablations.main()
  count = len(ablations.VARIANTS["stage1"])
  assert [seed for _, _, seed in done] == [0] * count + [1] * count
  assert len(record.read("ablations")) == 2 * count


def _unit(x):
  return x / np.linalg.norm(x, axis=1, keepdims=True)
