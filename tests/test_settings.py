"""Every setting has an effect: something compiled, drawn or written differs, or the run says so."""

import json
from collections import Counter
from types import SimpleNamespace
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax import train
from rtdmd_jax.config import flatten, load_config
from rtdmd_jax.errors import UserError
from rtdmd_jax.evaluate import evaluator, finish, held_out, systems
from rtdmd_jax.runtime.sharding import make_mesh
from rtdmd_jax.training import stages
from rtdmd_jax.training.unused_settings import settings_without_effect
from tests.support import toy, toy_run
from tests.support.paths import CONFIGS

STAGES = ("stage1", "stage2")
# What is traced is small; values with which more keys act than with those of the tiny run.
SMALL = {
  "stage1": (
    "batch.prompts=4", "batch.micro_batches=1", "dmd.timesteps=1000,500,250", "ema.decay=0.9",
    "dmd.consistency.weight=0.01",
  ),
}  # fmt: skip
SMALL["stage2"] = (*SMALL["stage1"], "batch.images_per_prompt=2", "policy.range_end=1")

_FAKE, _GENERATOR, _BOTH = "fake_score", ("generator", "policy"), ("fake_score", "policy")
# key: (another value, the part of `toy_run.Described` that differs: in both stages, or in each;
# what must be set for it).
CHANGES = {
  "seed": ("7", "batches"),
  **{f"model.{key}": ("elsewhere", "loaded") for key in ("pretrained", "generator_init")},
  **{f"model.{key}": ("elsewhere", "loaded") for key in ("fake_score_init", "teacher_init")},
  "model.image_size": ("96", "evaluation"),
  "model.dtype": ("bfloat16", "loaded"),
  "model.base_storage": ("int8", "loaded"),
  "model.offload": ("true", "loaded"),
  "model.remat": ("full", "loaded"),
  "model.attention": ("xla", "loaded"),
  "lora.rank": ("4", "adapters"),
  "lora.alpha": ("8", "fake_score"),
  "lora.init": ("normal", "adapters"),
  "lora.dtype": ("bfloat16", "adapters"),
  "lora.targets": ("attn.to_q", "adapters"),
  "load.generator": ("elsewhere", "loaded"),
  "load.fake_score": ("elsewhere", "loaded"),
  "data.prompts": ("elsewhere", "loaded"),
  "data.held_out": ("elsewhere", "loaded"),
  "data.cache_gb": ("0.5", "cache"),
  "dmd.timesteps": ("1000,600,250", ("fake_score", "rollout")),
  "dmd.objective": ("dmd", _FAKE),
  "dmd.eta": ("0.5", ("fake_score", "rollout")),
  "dmd.guidance_low": ("1.5", _GENERATOR),
  "dmd.guidance_high": ("6", _GENERATOR),
  "dmd.start_mode": ("fixed_boundary", _BOTH),
  "dmd.boundary_index": ("1", _BOTH, "dmd.start_mode=fixed_boundary"),
  "dmd.offset": ("30", _FAKE),
  "dmd.end": ("900", _FAKE),
  "dmd.min_step": ("50", _FAKE),
  "dmd.max_step": ("900", _FAKE),
  "dmd.inside": ("true", _FAKE),
  "dmd.normalize": ("false", _GENERATOR),
  "dmd.scale_out": ("false", _FAKE),
  "dmd.weight_low": ("0.1", _FAKE),
  "dmd.weight_high": ("5", _FAKE),
  "dmd.consistency.weight": ("0.02", _FAKE),
  "dmd.consistency.max_steps_back": ("100", _FAKE),
  "dmd.consistency.transitions": ("2", _FAKE),
  "dmd.consistency.two_sample": ("false", _FAKE),
  "dmd.consistency.stop_transitions": ("false", _FAKE),
  "dmd.consistency.adjacent": ("true", _FAKE),
  **{
    f"{network}.{key}": (value, part)
    for network, part in (("generator", _GENERATOR), ("fake_score", _FAKE))
    for key, value in (
      ("learning_rate", "0.1"), ("warmup_steps", "3"), ("b1", "0.5"), ("b2", "0.9"),
      ("eps", "1e-3"), ("weight_decay", "0.1"), ("clip_norm", "0.5"),
    )
  },
  "ema.decay": ("0.5", "finish"),
  "ema.every": ("3", "finish"),
  "ema.warmup": ("true", "finish"),
  "ema.applications": ("2", "finish"),
  "batch.prompts": ("3", "batches"),
  "batch.images_per_prompt": ("3", "batches"),
  "batch.micro_batches": ("2", _BOTH),
  "batch.decode_chunk": ("2", "rollout"),
  "train.check_numbers": ("true", ("fake_score", "rollout")),
  "eval.chunk": ("8", "evaluation"),
  "eval.teacher_steps": ("10", "evaluation"),
  "eval.teacher_guidance": ("2", "evaluation"),
  "eval.seed": ("7", "evaluation"),
  "policy.num_train_steps": ("1", "rollout"),
  "policy.range_start": ("1", "rollout", "policy.num_train_steps=1"),
  "policy.range_end": ("0", "rollout", "policy.num_train_steps=1"),
  "policy.clip_low": ("1e-3", "policy"),
  "policy.clip_high": ("1e-3", "policy"),
  "policy.advantage_limit": ("1", "policy"),
  "policy.kl_weight": ("0.1", "policy"),
  "policy.subset_factor": ("true", "policy"),
  "policy.gaussian_log_prob": ("true", "policy"),
  "policy.per_prompt": ("false", "policy"),
  "policy.global_std": ("false", "policy"),
  "policy.weight_advantages": ("false", "policy"),
  "policy.policy_weight": ("0.5", "policy"),
  "policy.dmd_weight": ("0.5", "policy"),
  "policy.reward_weight": ("0.5", "policy"),
  "policy.reward_margin": ("1", "policy"),
  "rewards.clipscore.directory": ("elsewhere", "loaded"),
  "rewards.geneval.detector": ("elsewhere", "loaded"),
}  # fmt: skip
# Of one stage alone; in the other one the run of `OBSERVED` shows them.
OF_STAGE_2 = {
  "train.fake_update_ratio": ("3", _FAKE),
  "rewards.clipscore.weight": ("0.5", "policy"),
  "rewards.clipscore.backpropagate": ("false", "rollout"),
  "rewards.geneval.weight": ("0.5", "policy"),
}
# What a run does with these is observed below; the code that reads them.
AT_RUN_TIME = {
  "stage": "stages.make_stage",
  "train.steps": "train._loop",
  "train.fake_update_ratio": "stage1.Stage1.step",
  "train.log_every": "train._loop",
  "train.save_every": "train._loop",
  "train.keep": "checkpoint.Checkpoints",
  "train.keep_every": "checkpoint.Checkpoints",
  "train.max_skipped": "nonfinite.NonFiniteGuard",
  "train.profile_start": "profiling.profiled",
  "train.profile_steps": "profiling.profiled",
  "train.grace_seconds": "preemption.Preemption",
  "eval.every": "train._loop",
  "eval.prompts": "held_out.evaluate",
  "eval.final_prompts": "held_out.final_evaluation",
  "eval.final_images": "held_out.final_evaluation",
  "eval.preview": "held_out.evaluate",
  "log.wandb": "train._writer",
  "log.wandb_project": "train._writer",
  "rewards.clipscore.weight": "held_out.evaluate",
  "rewards.geneval.weight": "held_out.evaluate",
}
MESH = ("mesh.data", "mesh.fsdp", "mesh.tensor")


def _config(stage, *overrides):
  return load_config(str(CONFIGS / f"tiny_{stage}.py"), [*SMALL[stage], *overrides])


def _keys(stage):
  return [key for key, _ in flatten(_config(stage).to_dict())]


_SEEN = {}


def _described(stage, *overrides):
  """Parts that were made for one test serve the next."""
  if (stage, overrides) not in _SEEN:
    _SEEN[stage, overrides] = toy_run.Described(_config(stage, *overrides))
  return _SEEN[stage, overrides]


def _named(config, key):
  return any(f"{key}=" in sentence for sentence in settings_without_effect(config))


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_is_looked_at(stage):
  known = {*CHANGES, *AT_RUN_TIME, *MESH} | (OF_STAGE_2.keys() if stage == "stage2" else set())
  assert set(_keys(stage)) - known == set()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_another_value_is_another_program_batch_or_file(stage):
  changes = CHANGES | (OF_STAGE_2 if stage == "stage2" else {})
  idle = []
  for key in sorted(set(_keys(stage)) & changes.keys()):
    value, part, *context = changes[key]
    part = part if isinstance(part, str) else part[STAGES.index(stage)]
    override = f"{key}={value}"
    changed = toy_run.Described(_config(stage, *context, override))
    if changed[part] == _described(stage, *context)[part]:
      idle.append(override)
    assert not _named(_config(stage, *context, override), key), key
  assert not idle


# (stage, what is set, programs that are not run, what then has no effect).
_DMD = "start_mode=fixed_boundary boundary_index=1 offset=30 end=900 inside=true scale_out=false"
_DMD += " weight_low=0.1 weight_high=5 consistency.weight=0.5 consistency.transitions=2"
_DMD = [f"dmd.{text}" for text in _DMD.split()]
_PATHS = ("max_steps_back=100", "transitions=2", "two_sample=false", "stop_transitions=false")
_PATHS = [f"dmd.consistency.{text}" for text in (*_PATHS, "adjacent=true")]
_OTHER_DMD = ["dmd.guidance_low=1.5", "dmd.guidance_high=6", "dmd.normalize=false"]
_OTHER_DMD += ["dmd.min_step=50", "dmd.max_step=900", "train.fake_update_ratio=4"]
_OTHER_DMD += ["fake_score.b1=0.5", "fake_score.weight_decay=0.1"]
IDLE = {
  "plain DMD": ("stage1", ["dmd.objective=dmd"], (), _DMD),
  "next level": ("stage1", [], (), ["dmd.boundary_index=1"]),
  "inside": ("stage1", ["dmd.inside=true"], (), ["dmd.min_step=50", "dmd.max_step=900"]),
  "no consistency": ("stage1", ["dmd.consistency.weight=0"], (), _PATHS),
  "adjacent": ("stage1", ["dmd.consistency.adjacent=true"], (), _PATHS[:1]),
  "no matching": ("stage2", ["policy.dmd_weight=0"], ("fake_score",), [*_DMD, *_OTHER_DMD]),
  "no back-propagation": (
    "stage2",
    ["rewards.clipscore.backpropagate=false"],
    (),
    ["policy.reward_margin=1", "policy.reward_weight=0.5"],
  ),
  "margin": ("stage2", ["policy.reward_weight=0"], (), ["policy.reward_margin=1"]),
  "baseline": ("stage2", ["policy.per_prompt=false"], (), ["policy.global_std=false"]),
  "no repeats": (
    "stage2",
    ["batch.images_per_prompt=1"],
    (),
    ["policy.per_prompt=false", "policy.global_std=false"],
  ),
  "no profile": ("stage1", [], None, ["train.profile_start=3"]),
  "no W&B": ("stage1", [], None, ["log.wandb_project=mine"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", IDLE)
def test_a_setting_that_changes_no_program_is_named(case):
  stage, context, unused, overrides = IDLE[case]
  config = _config(stage, *context, *overrides)
  for override in overrides:
    assert _named(config, override.split("=")[0]), override
  if unused is None:
    return
  plain, changed = _described(stage, *context), toy_run.Described(config)
  for name in plain.programs():
    assert name in unused or plain[name] == changed[name], name


def test_gradients_of_rewards_that_nothing_uses_are_named():
  assert _named(
    load_config(str(CONFIGS / "tiny_stage2.py"), ["policy.reward_weight=0"]),
    "rewards.clipscore.backpropagate",
  )
  config = _config("stage1").unlock()
  config.rewards.clipscore.backpropagate = True
  assert _named(config, "rewards.clipscore.backpropagate")


@pytest.mark.parametrize("name", sorted(p.name for p in CONFIGS.glob("*_stage?.py")))
def test_shipped_configurations_set_nothing_in_vain(name):
  config = load_config(str(CONFIGS / name))
  assert settings_without_effect(config) == []
  if config.stage == "stage2":  # as published
    assert config.train.fake_update_ratio == 1


@pytest.mark.parametrize("key", MESH)
def test_the_mesh_is_that_of_the_settings(key):
  count = jax.device_count() + 1
  config = _config("stage1", "mesh.fsdp=1", f"{key}={count}")
  with pytest.raises(UserError, match=f"{key.removeprefix('mesh.')} {count}"):
    make_mesh(**config.mesh)


class _End(Exception):
  """Of a run, at its final evaluation."""


class _Evaluator:
  """Grey images without a score; keeps what it was asked for."""

  asked: dict

  def __init__(self, setup, config):
    type(self).asked = {}

  def images(self, system, prompts):
    return np.full((len(prompts), 8, 8, 3), 128, np.uint8)

  teacher_images = images

  def predictions(self, system, fake_score, prompts):
    self.asked["eval.preview"] = len(prompts)
    return self.images(system, prompts)

  def look(self, system, prompts, rewards, more=()):
    self.asked["eval.prompts"] = len(prompts)
    return evaluator.Look(
      self.images(system, [*prompts, *more]), evaluator.missing(len(prompts), {}), ""
    )

  def compare(self, systems, sets, workdir, repeats):
    self.asked |= {"eval.final_prompts": len(sets[0].prompts), "eval.final_images": repeats}
    raise _End


def _watched(patch, module, name, seen, key, argument):
  """Puts a subclass in place of a class; it notes an argument of `__init__` by position."""
  original = getattr(module, name)

  class Watched(original):
    def __init__(self, *args, **kwargs):
      seen[key] = args[argument]
      super().__init__(*args, **kwargs)

  patch.setattr(module, name, Watched)


@pytest.mark.slow
def test_a_run_does_what_its_settings_say(tmp_path, monkeypatch, capsys):
  settings = {
    "train.steps": 7, "train.fake_update_ratio": 3, "train.log_every": 3, "train.save_every": 2,
    "train.keep": 1, "train.keep_every": 4, "train.max_skipped": 5, "train.profile_start": 2,
    "train.profile_steps": 2, "train.grace_seconds": 9.0, "eval.every": 3, "eval.prompts": 6,
    "eval.final_prompts": 9, "eval.final_images": 2, "eval.preview": 4, "log.wandb": True,
    "log.wandb_project": "mine", "rewards.clipscore.weight": 0.0,
  }  # fmt: skip
  overrides = (f"{key}={value}" for key, value in settings.items())
  config = _config("stage1", "dmd.boundary_index=1", *overrides)
  toy_run.Toy().install(monkeypatch)
  calls, seen, profile = Counter(), {}, []

  def program(name):
    jitted = jax.jit(lambda state, frozen, batch: (state, {f"loss/{name}": jnp.ones(())}))

    def run(*args):
      calls[name] += 1
      return jitted(*args)

    run.trace = jitted.trace
    return run

  def programs(*args, **how):
    finish = original(*args, **how)["finish"]
    return {name: program(name) for name in ("fake_score", "generator")} | {"finish": finish}

  original, wandb, saved = stages.compile_programs, MagicMock(), []
  monkeypatch.setattr(stages, "compile_programs", programs)
  monkeypatch.setattr(stages, "new_adapters", lambda config, pipeline, key: toy.adapters(1))
  for module in (train, finish):
    monkeypatch.setattr(module, "export_adapters", lambda *args: None)
  monkeypatch.setattr(train, "import_wandb", wandb.imported)
  monkeypatch.setattr(train, "WandbRun", wandb.run)
  monkeypatch.setattr(train, "Evaluator", _Evaluator)
  monkeypatch.setattr(systems, "teacher", lambda *args: SimpleNamespace(steps=1, name="teacher"))
  for name in ("start_trace", "stop_trace"):
    monkeypatch.setattr(jax.profiler, name, lambda *args: profile.append(calls["fake_score"]))
  _watched(monkeypatch, train, "Preemption", seen, "train.grace_seconds", 0)
  _watched(monkeypatch, train, "NonFiniteGuard", seen, "train.max_skipped", 0)
  _watched(monkeypatch, held_out, "Monitor", seen, "rewards.geneval.weight", 1)
  save = train.Checkpoints.save
  monkeypatch.setattr(
    train.Checkpoints, "save", lambda self, step, *a: (saved.append(step), save(self, step, *a))
  )
  with pytest.raises(_End):
    train.train(config, tmp_path)
  assert capsys.readouterr().out.count("warning: dmd.boundary_index=1 has no effect") == 1

  kept = sorted(int(path.name) for path in tmp_path.glob("checkpoints/*") if path.name.isdigit())
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  observed = seen | _Evaluator.asked
  observed |= {
    "stage": [*calls],
    "train.steps": calls["fake_score"],
    "train.fake_update_ratio": calls["generator"],
    "train.log_every": sorted({line["step"] for line in lines if "loss/fake_score" in str(line)}),
    "train.save_every": saved,
    "train.keep": kept[-1:],
    "train.keep_every": kept[:-1],
    "train.profile_start": profile[0],
    "train.profile_steps": profile[1] - profile[0],
    "eval.every": sorted(int(path.stem[5:]) for path in tmp_path.glob("previews/*.png")),
    "log.wandb": wandb.imported.called,
    "log.wandb_project": wandb.run.call_args.kwargs["project"],
    "rewards.clipscore.weight": "clipscore" in seen["rewards.geneval.weight"],
  }
  expected = settings | {
    "stage": ["fake_score", "generator"],
    "train.fake_update_ratio": 2,
    "train.log_every": [3, 6, 7],
    "train.save_every": [2, 4, 6, 7],
    "train.keep": [7],
    "train.keep_every": [4],
    "train.profile_start": 1,  # steps done before
    "eval.every": [0, 3, 6],
    "rewards.clipscore.weight": False,  # a monitor takes it for a reward that is not trained
    "rewards.geneval.weight": ["geneval"],
  }
  assert observed == expected and observed.keys() == AT_RUN_TIME.keys()
