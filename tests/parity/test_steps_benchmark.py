"""The updates that benchmarks/steps.py times against PyTorch's compute the same."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("diffusers")
from benchmarks import steps

pytestmark = [pytest.mark.parity, pytest.mark.slow]

SMALL = steps.SIZES | dict(
  sample_size=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
  caption_projection_dim=16, pooled_projection_dim=12, pos_embed_max_size=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def case():
  return steps.make_case(SMALL, 2, 5)


@pytest.mark.parametrize("name", steps.UPDATES)
def test_the_peer_computes_the_same_update(case, name):
  ours, theirs = case.ours[name](), case.theirs[name]()
  assert ours.keys() == theirs.keys() and case.flops[name] > 0
  for part, value in ours.items():
    if name == "policy" and part in ("policy", "loss"):
      # Its value is minus the mean advantage, which is zero but for rounding; its gradient counts.
      assert value == pytest.approx(theirs[part], abs=1e-6), part
    else:
      assert value != 0.0
      assert value == pytest.approx(theirs[part], rel=1e-4), part
