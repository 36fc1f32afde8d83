import re

import pytest
from ml_collections import ConfigDict

from rtdmd_jax.config import load_config
from rtdmd_jax.errors import UserError
from rtdmd_jax.training import idle, validate
from rtdmd_jax.training.validate import check_limits, check_stage, violations
from tests.support.paths import CONFIGS

TRAINING = sorted(p.name for p in CONFIGS.glob("*_stage?.py"))


@pytest.mark.parametrize("name", TRAINING)
def test_shipped_configurations_pass(name):
  config = load_config(str(CONFIGS / name))
  check_limits(config)
  assert not idle.warnings(config)


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
    "dmd.timesteps=250,1000",
    "dmd.timesteps=",
    "dmd.eta=1.5",
    "ema.decay=1",
    "train.log_every=0",
    "train.grace_seconds=0",
    "generator.learning_rate=inf",
    "fake_score.b2=1",
    "seed=-1",
    "model.dtype=float8_e4m3fn",
    "model.remat=some",
    "model.attention=flash",
    "batch.micro_batches=0",
    "dmd.objective=gan",
    "dmd.start_mode=now",
    "dmd.guidance_low=nan",
    "dmd.offset=-1",
    "dmd.max_step=2000",
    "dmd.weight_high=inf",
    "dmd.consistency.transitions=0",
    "dmd.consistency.weight=-1",
    "dmd.consistency.max_steps_back=0",
    "policy.advantage_limit=-5",
    "policy.clip_low=0",
    "policy.clip_high=nan",
    "policy.num_train_steps=0",
    "policy.range_start=-1",
    "policy.kl_weight=-0.1",
    "policy.policy_weight=nan",
    "policy.dmd_weight=inf",
    "policy.reward_margin=nan",
    "eval.teacher_guidance=-1",
    "rewards.clipscore.weight=nan",
  ],
)
def test_a_value_that_no_run_can_use_is_named(override):
  config = load_config(str(CONFIGS / "tiny_stage2.py"), [override])
  with pytest.raises(UserError, match=override.partition("=")[0] + " is .*; it must be "):
    check_limits(config)


@pytest.mark.parametrize(
  "overrides, message",
  [
    (["dmd.guidance_low=4"], "dmd.guidance_low is 4.0 and dmd.guidance_high is 3.0; the first"),
    (["dmd.min_step=990"], "dmd.min_step is 990.0 and dmd.max_step is 980.0"),
    (["dmd.weight_low=11"], "dmd.weight_low is 11.0 and dmd.weight_high is 10.0"),
    (
      ["dmd.end=10", "dmd.min_step=5"],
      "dmd.offset is 10.0 and dmd.end is 10.0; the first must be below",
    ),
    (["dmd.start_mode=fixed_boundary", "dmd.boundary_index=5"], "it must be in 1..4"),
    (["policy.range_start=2", "policy.range_end=1"], "range_start..range_end is 2..1; stochastic"),
    (["policy.range_end=3"], "is 0..3; stochastic steps are 0..2"),
    (["policy.num_train_steps=4"], "policy.num_train_steps is 4, but .* holds 3"),
    (["dmd.timesteps=1000"], "dmd.timesteps has one step"),
    (["dmd.eta=0"], "dmd.eta is 0, .* no policy gradient; raise dmd.eta, or set policy.policy_wei"),
    (
      ["dmd.eta=0", "policy.policy_weight=0", "policy.kl_weight=0.1"],
      "policy.kl_weight is 0.1, wh",
    ),
    (
      ["dmd.eta=0", "policy.policy_weight=0", "policy.gaussian_log_prob=true"],
      "policy.gaussian_log_prob is True, which divides",
    ),
    (
      ["policy.policy_weight=0", "policy.dmd_weight=0", "policy.reward_weight=0"],
      "nothing trains the generator",
    ),
    (
      ["rewards.clipscore.weight=0", "rewards.geneval.weight=0", "policy.dmd_weight=0"],
      "nothing trains the generator",
    ),
    (["model.dtype=float64"], "model.dtype is 'float64', for which jax takes float32"),
  ],
)
def test_values_that_rule_each_other_out(overrides, message):
  config = load_config(str(CONFIGS / "tiny_stage2.py"), overrides)
  (sentence,) = violations(config)
  assert re.search(message, sentence), sentence


def test_eta_0_is_a_choice_where_no_policy_is_trained():
  assert not violations(load_config(str(CONFIGS / "tiny_stage1.py"), ["dmd.eta=0"]))
  overrides = ["dmd.eta=0", "policy.policy_weight=0"]
  assert not violations(load_config(str(CONFIGS / "tiny_stage2.py"), overrides))


def test_all_violations_are_named():
  overrides = ["policy.advantage_limit=-5", "dmd.eta=0", "lora.rank=0", "dmd.min_step=990"]
  found = violations(load_config(str(CONFIGS / "tiny_stage2.py"), overrides))
  assert len(found) == 4
  config = load_config(str(CONFIGS / "tiny_stage2.py")).unlock()
  config.dmd.unlock().min_step = None
  del config.rewards.geneval["weight"]
  config.eval.rewards.ocr = 3
  first, *rest = violations(config)
  assert first == "dmd.min_step is None; it must be a number from 0 to 1000."
  assert "rewards.geneval.weight is None; it must be a finite number." in rest
  assert "eval.rewards.ocr is 3; it must be a section with the reward's options." in rest
  for name in list(config.rewards):
    del config.rewards[name]
  assert any(sentence.startswith("rewards is empty") for sentence in violations(config))


def test_float16_is_refused_on_tpus(monkeypatch):
  config = load_config(str(CONFIGS / "tiny_stage2.py"), ["model.dtype=float16"])
  assert not violations(config)
  monkeypatch.setattr(validate.jax, "default_backend", lambda: "tpu")
  assert violations(config) == [
    "model.dtype is 'float16', in which TPUs do not compute; use bfloat16."
  ]


@pytest.mark.parametrize(
  "overrides, message",
  [
    (["batch.images_per_prompt=1"], "batch.images_per_prompt is 1 and policy.per_prompt is true"),
    (["dmd.boundary_index=3"], "only dmd.start_mode=fixed_boundary reads it"),
    (["policy.reward_weight=0", "policy.reward_margin=1"], "no reward is back-propagated"),
    (["generator.learning_rate=0"], "the generator stays as it starts"),
    (["rewards.clipscore.weight=0", "rewards.geneval.weight=0"], "every reward has weight 0"),
  ],
)
def test_settings_that_do_nothing_are_warnings(overrides, message):
  config = load_config(str(CONFIGS / "tiny_stage2.py"), overrides)
  assert not violations(config)
  assert sum(message in sentence for sentence in idle.warnings(config)) == 1


def test_the_configuration_of_another_tool_is_told():
  for kind, tool in (("infer", "sample"), ("eval", "evaluate")):
    with pytest.raises(UserError, match=f"run python -m rtdmd_jax.{tool} with it"):
      check_stage(load_config(str(CONFIGS / f"tiny_{kind}.py")))
  with pytest.raises(UserError, match="stage is None; use one of stage1, stage2 or pretrain"):
    check_stage(ConfigDict({"seed": 1}))


@pytest.mark.parametrize(
  "name, overrides, message",
  [
    ("tiny_stage2.py", ["ema.every=8", "train.steps=4"], "ema.every is 8 and train.steps is 4"),
    ("tiny_stage1.py", ["train.steps=2"], "train.fake_update_ratio is 3 and .* never updated"),
    ("tiny_stage2.py", ["ema.every=4", "train.steps=4"], None),
    ("tiny_stage1.py", ["train.steps=0"], None),
  ],
)
def test_what_never_happens_in_a_short_run_is_a_warning(name, overrides, message):
  config = load_config(str(CONFIGS / name), overrides)
  assert not violations(config)
  found = [sentence for sentence in idle.warnings(config) if "train.steps" in sentence]
  assert len(found) == (message is not None)
  assert message is None or re.search(message, found[0])


def test_a_configuration_of_something_else():
  with pytest.raises(UserError, match="has no seed; it must be a whole number"):
    check_limits(ConfigDict({"stage": "stage1"}))
