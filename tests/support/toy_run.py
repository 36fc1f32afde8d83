"""A run of the toy backbone by a real configuration: no file is read, programs are only traced."""

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from rtdmd_jax.datasets import prompts
from rtdmd_jax.evaluate import evaluator as evaluator_module
from rtdmd_jax.evaluate import systems
from rtdmd_jax.evaluate.evaluator import Evaluator
from rtdmd_jax.models import build_transformer
from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.rewards import held_out_sets
from rtdmd_jax.rewards.device.description import RewardDescription
from rtdmd_jax.training import describe, setup, stages
from rtdmd_jax.training.describe import new_adapters
from rtdmd_jax.training.programs import compile_programs
from rtdmd_jax.training.state import TrainState
from rtdmd_jax.weights.safetensors import read_config
from tests.support import toy
from tests.support.paths import TINY

PROMPTS = [prompts.Prompt(f"prompt {i}", {}) for i in range(40)]


class Bright:
  """A reward on the device."""

  params = jnp.float32(1)
  transform = gradient_transform = 0

  def score(self, params, images, text):
    return images.mean((1, 2, 3)) * text[:, 0]


class Toy:
  """Stands in for what `build` loads from files, and writes down with which settings.

  Attributes:
    calls: name of a loader -> the arguments of its calls.
  """

  def __init__(self):
    self.calls = {}

  def record(self, name, *args, **kwargs):
    self.calls.setdefault(name, []).append(repr((args, kwargs)))

  def install(self, patch: pytest.MonkeyPatch) -> "Toy":
    def loads(name, result):
      def load(*args, **kwargs):
        self.record(name, *args, **kwargs)
        return result(*args)

      return load

    patch.setattr(describe, "describe_pipeline", loads("pipeline", lambda *_: self.described()))
    patch.setattr(setup.Pipeline, "abstract", lambda *_: self.pipeline())
    patch.setattr(setup.Pipeline, "load", loads("values", lambda *_: self.pipeline()))
    for module in (setup, held_out_sets):
      patch.setattr(module, "load_prompts", loads("prompts", lambda *_: PROMPTS))
    patch.setattr(setup, "_check_prompts", lambda *_: None)
    patch.setattr(setup, "load_base", loads("base", lambda *_: toy.frozen().bases["base"]))
    patch.setattr(setup, "_stage_one", loads("adapters", lambda *_: {}))
    patch.setattr(setup, "make", loads("host rewards", lambda *_: None))
    reward = RewardDescription(Bright(), Bright)
    patch.setattr(setup.device_rewards, "describe", loads("device reward", lambda *_: reward))
    patch.setattr(setup, "decode_images", lambda vae, params, x: jax.nn.sigmoid(x))
    patch.setattr(setup, "_encoder", lambda pipeline, models: lambda texts: _encoded(texts, models))
    return self

  def described(self):
    return SimpleNamespace(
      directory=Path("toy"),
      transformer=SimpleNamespace(config=None),
      dtype="float32",
      storage="native",
    )

  def pipeline(self):
    def sigmas(levels, size):
      return np.append(np.asarray(levels, np.float32) / 1000, np.float32(0))

    def clone(remat):
      self.record("decoder", remat)

    return SimpleNamespace(
      transformer=SimpleNamespace(apply=toy.apply, embedded_guidance=False, config=None),
      text=SimpleNamespace(limits=()),
      params=toy.frozen().bases["base"],
      vae=SimpleNamespace(clone=clone),
      vae_params={},
      schedule=SimpleNamespace(shift=3.0),
      few_step_sigmas=sigmas,
      euler_sigmas=lambda steps, size: np.linspace(1, 0, steps + 1, dtype=np.float32),
      latent_shape=lambda size: (size // 32, size // 32, 3),
      encode=lambda texts: _conditioning(len(texts)),
    )


def _conditioning(count):
  return Conditioning(jnp.ones((count, 4, 3)), None)


def _encoded(texts, models):
  return {
    "conditioning": _conditioning(len(texts)),
    "reward_text": {name: jnp.ones((len(texts), 1)) for name in models},
  }


def text(traced):
  """What a traced program computes, without what no result needs, and its constants."""
  closed = traced.jaxpr
  used, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
  constants = [np.asarray(value).tolist() for value in closed.consts]
  return re.sub(r"0x[0-9a-f]+", "", str(used)), constants


class Described:
  """What a run of `config` would compute, part by part, as text; each part is made once."""

  def __init__(self, config):
    self._config, self._parts = config, {}

  def __getitem__(self, name):
    if name not in self._parts:
      with pytest.MonkeyPatch.context() as patch:
        self._toy = Toy().install(patch)
        self._setup = setup.build(self._config)
        part = getattr(self, f"_{name}", None)
        self._parts[name] = part(patch) if part else self._program(name)
    return self._parts[name]

  def programs(self):
    """Names of the programs of a step."""
    names = {"stage1": ("fake_score", "generator"), "stage2": ("rollout", "fake_score", "policy")}
    return (*names[self._config.stage], "finish")

  def _loaded(self, patch):
    roles, scoring = self._setup.roles, self._setup.scoring
    return (self._toy.calls, roles.generator, roles.fake_score, roles.teacher, scoring.weights)

  def _cache(self, patch):
    return {name: value for name, value in vars(self._setup.cache).items() if np.isscalar(value)}

  def _batches(self, patch):
    found = []
    for number in range(2):
      batch, chosen = stages.step_batch(self._config, self._setup, number)
      found.append((np.asarray(batch.sample_index).tolist(), [p.text for p in chosen]))
    return found

  def _adapters(self, patch):
    """The start of both networks, of the shipped tiny transformer."""
    folder = TINY
    pipeline = SimpleNamespace(transformer=build_transformer(read_config(folder / "transformer")))
    make = lambda: new_adapters(self._config, pipeline, jax.random.key(self._config.seed))  # noqa: E731
    return text(jax.jit(make).trace())

  def _evaluation(self, patch):
    """The programs that draw images, with the number of images at once."""
    texts = []

    def written(run):
      def draw(*args):
        traced = jax.jit(run).trace(*args)
        texts.append(text(traced))
        return jax.tree.map(lambda s: np.ones(s.shape, s.dtype), traced.out_info)

      return draw

    patch.setattr(evaluator_module, "jit", written)
    evaluator = Evaluator(self._setup, self._config)
    adapters = toy.adapters(1)
    patch.setattr(systems, "fold_scale", lambda tree, alpha: tree)
    teacher = systems.teacher(self._setup, self._config)
    few = systems.generator(self._setup, self._config, "generator", adapters)
    for system in (teacher, few):
      evaluator.images(system, PROMPTS)
    return texts

  def _program(self, name):
    config, setup = self._config, self._setup
    optimizers = stages.make_optimizers(config)
    generator, fake = toy.adapters(1), toy.adapters(2)
    state = TrainState(
      jnp.zeros((), jnp.int32), generator, fake, generator, optimizers.generator.init(generator),
      optimizers.fake_score.init(fake),
    )  # fmt: skip
    batch, _ = stages.step_batch(config, setup, 0)
    programs = {program.name: program for program in stages.step_programs(config, setup)}
    compiled = compile_programs(
      tuple(programs.values()), config.seed, check_numbers=config.train.check_numbers
    )
    assert (*programs,) == self.programs()
    known = {"state": state, "frozen": setup.frozen, "batch": batch}
    if "samples" in programs[name].reads:
      rollout = programs["rollout"].arguments(known)
      known["samples"] = jax.eval_shape(compiled["rollout"], *rollout)
      score = jax.ShapeDtypeStruct(batch.sample_index.shape, jnp.float32)
      known["rewards"] = dict.fromkeys(config.rewards, score)
    return text(compiled[name].trace(*programs[name].arguments(known)))
