from pathlib import Path

import pytest
from ml_collections import ConfigDict

from rtdmd_jax.config import load_config
from rtdmd_jax.errors import UserError
from rtdmd_jax.limits import check_limits

CONFIGS = Path(__file__).parents[1] / "configs"
TRAINING = sorted(p.name for p in CONFIGS.glob("*_stage?.py"))


@pytest.mark.parametrize("name", TRAINING)
def test_shipped_configurations_pass(name):
  check_limits(load_config(str(CONFIGS / name)))


@pytest.mark.parametrize(
  "override",
  [
    "batch.prompts=0",
    "lora.rank=-1",
    "lora.alpha=nan",
    "lora.init=zeros",
    "lora.dtype=float16",
    "lora.targets=",
    "model.dtype=int8",
    "model.dtype=float33",
    "model.base_storage=int4",
    "dmd.steps=250,1000",
    "dmd.steps=",
    "dmd.eta=1.5",
    "ema.decay=1",
    "train.log_every=0",
    "train.grace_seconds=0",
    "generator.learning_rate=inf",
    "fake_score.b2=1",
    "seed=-1",
  ],
)
def test_a_value_that_no_run_can_use_is_named(override):
  config = load_config(str(CONFIGS / "tiny_stage2.py"), [override])
  with pytest.raises(UserError, match=override.partition("=")[0] + " is .*; it must be "):
    check_limits(config)


@pytest.mark.parametrize(
  "name, overrides, message",
  [
    ("tiny_stage2.py", ["ema.every=8", "train.steps=4"], "ema.every is 8 and train.steps is 4"),
    ("tiny_stage1.py", ["train.steps=2"], "train.fake_update_ratio is 3 .* never be updated"),
    ("tiny_stage2.py", ["ema.every=4", "train.steps=4"], None),
    ("tiny_stage2.py", ["train.fake_update_ratio=9", "train.steps=4"], None),
    ("tiny_stage1.py", ["train.steps=0"], None),
  ],
)
def test_what_would_never_happen_is_refused(name, overrides, message):
  config = load_config(str(CONFIGS / name), overrides)
  if message is None:
    check_limits(config)
  else:
    with pytest.raises(UserError, match=message):
      check_limits(config)


def test_a_configuration_of_something_else():
  with pytest.raises(UserError, match="has no seed; it must be a whole number"):
    check_limits(ConfigDict({"stage": "stage1"}))
