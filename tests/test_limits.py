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


def test_a_configuration_of_something_else():
  with pytest.raises(UserError, match="has no seed; it must be a whole number"):
    check_limits(ConfigDict({"stage": "stage1"}))
