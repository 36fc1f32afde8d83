"""Bases of the roles: loaded once a path, and checked against the pipeline's network."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rtdmd_jax.aot.abstract import abstract_setup
from rtdmd_jax.config import load_config
from rtdmd_jax.errors import UserError
from rtdmd_jax.evaluate.evaluator import Evaluator
from rtdmd_jax.pipeline import Pipeline
from rtdmd_jax.pipeline.describe import describe_pipeline
from rtdmd_jax.training.describe import describe, role_bases
from rtdmd_jax.training.setup import abstract, build, load_bases
from tests.support.paths import CONFIGS

HERE = __name__
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipeline():
  return Pipeline.from_pretrained(_model().pretrained)


def _bases(model, pipeline):
  """The parameters of the roles' bases, and the key of each role's."""
  described = describe_pipeline(model.pretrained, base_storage=model.base_storage)
  own, keys = role_bases(model, described)
  return load_bases(described, (own, *keys.values()), pipeline.params), keys


def _model(**inits):
  overrides = [f"model.{name}={value}" for name, value in inits.items()]
  return load_config(str(CONFIGS / "tiny_stage1.py"), overrides).model


@pytest.fixture
def other(tmp_path):
  """A transformer of the same network with another last bias."""
  directory = tmp_path / "other"
  shutil.copytree(Path(_model().pretrained) / "transformer", directory / "transformer")
  tensors = load_file(directory / "transformer" / WEIGHTS)
  tensors["proj_out.bias"] = tensors["proj_out.bias"] + 1
  save_file(tensors, directory / "transformer" / WEIGHTS)
  return directory


def test_without_inits_all_roles_share_the_pipelines_arrays(pipeline):
  bases, keys = _bases(_model(), pipeline)
  assert len(set(keys.values())) == 1 and len(bases) == 1
  assert bases[keys["teacher"]] is pipeline.params


def test_a_role_may_have_its_own_base_and_equal_paths_are_loaded_once(pipeline, other):
  # A pipeline's directory, its transformer's, and a detour to it are the same path.
  detour = other / "transformer" / ".." / "transformer"
  model = _model(generator_init=other, teacher_init=detour)
  bases, keys = _bases(model, pipeline)
  assert len(bases) == 2 and keys["generator"] == keys["teacher"]
  own, new = (bases[keys[role]]["proj_out"] for role in ("fake_score", "generator"))
  # The checkpoint is float16, where adding 1 rounds.
  np.testing.assert_allclose(new["bias"], own["bias"] + 1, atol=1e-3)
  np.testing.assert_array_equal(new["kernel"], own["kernel"])


def test_a_roles_own_base_is_stored_as_the_config_says(pipeline, other):
  bases, keys = _bases(_model(generator_init=other, base_storage="int8"), pipeline)
  layer = bases[keys["generator"]]["blocks_0"]["attn"]["to_q"]
  exact = pipeline.params["blocks_0"]["attn"]["to_q"]["kernel"]
  assert layer["kernel"].dtype == np.int8 and layer["bias"].dtype == exact.dtype
  scale = np.asarray(layer["kernel_scale"])[:, None]
  assert (np.abs(layer["kernel"] * scale - exact) <= 0.5001 * scale).all()


def test_a_single_file_is_a_base_too(pipeline, other):
  model = _model(fake_score_init=other / "transformer" / WEIGHTS)
  bases, keys = _bases(model, pipeline)
  assert len(bases) == 2 and keys["fake_score"].endswith(WEIGHTS)


def test_a_base_of_another_network_is_refused(pipeline, other):
  file = other / "transformer/config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"num_layers": 3}))
  with pytest.raises(UserError, match="teacher_init.*another network"):
    _bases(_model(teacher_init=other), pipeline)


def brightness():
  """A reward of the host, as users name theirs by import path."""
  return lambda images, prompts, metadata: images.mean((1, 2, 3)) / 255.0


def _watching(**rewards):
  """The tiny stage 2 that trains GenEval and watches these rewards."""
  config = load_config(str(CONFIGS / "tiny_stage2.py"))
  with config.unlocked():
    del config.rewards["clipscore"]
    for name, options in rewards.items():
      config.eval.rewards[name] = options
  return config


def _clip():
  return {"directory": str(Path(_model().pretrained) / "clip")}


def test_watched_rewards_are_evaluated_and_not_trained(tmp_path):
  (tmp_path / "own.txt").write_text("a photo of a cat\n")
  own = {"held_out": str(tmp_path / "own.txt")}
  config = _watching(
    **{f"{HERE}:brightness": own},
    clipscore=_clip(),
    aesthetic={"directory": "nowhere", "weights": "nowhere.pth"},
    **{f"{HERE}:nothing": own},
  )
  setup = build(config)
  assert set(setup.scoring.weights) == {"geneval"} and not setup.scoring.device
  assert [part.rewards for part in setup.held_out_sets] == [
    ("geneval", "aesthetic", "clipscore"),
    (f"{HERE}:brightness", f"{HERE}:nothing"),
  ]
  assert setup.held_out is setup.held_out_sets[0].prompts
  assert [p.text for p in setup.held_out_sets[1].prompts] == ["a photo of a cat"]
  assert set(setup.watched) == {"clipscore"} == set(setup.frozen.rewards)
  evaluator, prompts = Evaluator(setup, config), setup.held_out[:3]
  images = np.full((3, 64, 64, 3), 51, np.uint8)
  scores = evaluator.scores(images, prompts)
  assert set(scores.values) == {name for part in setup.held_out_sets for name in part.rewards}
  assert set(scores.reasons) == {"aesthetic", f"{HERE}:nothing"}
  assert scores.failed("aesthetic") == 3 and "nowhere" in scores.reasons["aesthetic"]
  np.testing.assert_allclose(scores.values[f"{HERE}:brightness"], 0.2)
  assert np.isfinite(scores.values["clipscore"]).all()
  assert set(evaluator.scores(images, prompts, ["clipscore"]).values) == {"clipscore"}
  # What a device does wrong costs its scores alone.
  failing = [
    (lambda params, images, text: np.full(len(images), np.nan), "its score is not finite"),
    (lambda params, images, text: np.zeros((len(images), 2)), "has shape (3, 2), not [3]"),
    (lambda params, images, text: 1 / 0, "ZeroDivisionError: division by zero"),
  ]
  for score, reason in failing:
    evaluator._scores["clipscore"] = score
    assert reason in evaluator.scores(images, prompts).reasons["clipscore"]


def test_a_reward_is_either_trained_or_watched():
  config = _watching(clipscore=_clip())
  with config.unlocked():
    config.rewards["clipscore"] = {"weight": 1.0, **_clip()}
  with pytest.raises(UserError, match="eval.rewards.clipscore"):
    build(config)


@pytest.mark.parametrize(
  ("rewards", "message"),
  [
    ({"genevl": {}}, "did you mean 'geneval'"),
    ({"aesthetic": {"directry": "x"}}, "aesthetic"),
    ({"hpsv3": {}}, "needs one of the options url, directory"),
    ({"aesthetic": {"backpropagate": True}}, "eval.rewards.aesthetic.backpropagate is true"),
  ],
)
def test_a_wrong_option_of_a_watched_reward_is_an_error_at_the_start(rewards, message):
  with pytest.raises(UserError, match=message):
    build(_watching(**rewards))


def test_prompts_without_records_are_refused_before_anything_is_loaded(tmp_path, capsys):
  (tmp_path / "plain.txt").write_text("a photo of a cat\na photo of a dog\n")
  config = _watching()
  with config.unlocked():
    config.model.pretrained = "nowhere"
    config.data.held_out = str(tmp_path / "plain.txt")
  with pytest.raises(UserError, match="nowhere"):
    build(config)
  assert "warning: rewards.geneval cannot score 2 of the 2 prompts" in capsys.readouterr().out
  with config.unlocked():
    config.data.prompts = str(tmp_path / "plain.txt")
  with pytest.raises(UserError, match="rewards.geneval cannot score 2 of the 2 prompts"):
    build(config)


def nothing():
  """A reward of the host that cannot be built."""
  raise FileNotFoundError("judge.pt")


def _leaves(setup):
  """Shape and type of everything that a setup holds, by its path."""
  pipeline, frozen = setup.pipeline, setup.frozen
  trees = {
    **{name: getattr(frozen, name) for name in ("bases", "generator", "fake_score", "vae")},
    "rewards": frozen.rewards,
    "params": (pipeline.params, pipeline.vae_params, pipeline.text.params),
    "unconditional": setup.unconditional,
    "sigmas": setup.roles.sigmas,
  }
  leaves, _ = jax.tree_util.tree_flatten_with_path(trees)
  return {jax.tree_util.keystr(path): (leaf.shape, str(leaf.dtype)) for path, leaf in leaves}


@pytest.mark.parametrize(
  "config, overrides",
  [("tiny_stage1.py", ()), ("tiny_stage2.py", ("model.base_storage=int8", "model.dtype=bfloat16"))],
)
def test_a_run_is_loaded_as_it_is_described(other, config, overrides):
  config = load_config(str(CONFIGS / config), (*overrides, f"model.teacher_init={other}"))
  with config.unlocked():
    del config.rewards["geneval"]
    config.rewards.clipscore.dtype = "bfloat16"
    config.eval.rewards.pickscore = _clip()
  described, loaded = abstract(describe(config)), build(config)
  assert _leaves(described) == _leaves(loaded) == _leaves(abstract_setup(config))
  assert {"clipscore", "pickscore"} == set(described.frozen.rewards)
  assert set(described.watched) == set(loaded.watched) == {"pickscore"}
  for name in ("generator", "fake_score", "teacher", "lora_alpha", "latent_shape"):
    assert getattr(described.roles, name) == getattr(loaded.roles, name)
