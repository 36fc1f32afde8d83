"""Rewards on the device by name, together, and from the host; on the shipped tiny CLIP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax import rewards
from rtdmd_jax.config import load_config
from rtdmd_jax.datasets.shapes.draw import draw
from rtdmd_jax.datasets.shapes.grammar import all_records
from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards import device_rewards
from rtdmd_jax.training.latent_rewards import score_latents
from rtdmd_jax.training.setup import build
from tests.support import toy
from tests.support.paths import CONFIGS, TINY

CLIP = {"directory": str(TINY / "clip")}


def _drawn(count):
  records = all_records()[:count]
  images = np.stack([draw(record, np.random.default_rng(i))[0] for i, record in enumerate(records)])
  return images, [record["prompt"] for record in records]


class Counting:
  """A reward that shows what it was given."""

  params = 2.0

  def __init__(self):
    self.tokenized = []

  def tokenize(self, prompts):
    self.tokenized.append(list(prompts))
    return np.array([[len(p)] for p in prompts])

  def text_features(self, params, ids):
    return params * ids

  def score(self, params, images, text_features):
    return images.max((1, 2, 3)) + text_features[:, 0]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_chunks_and_repeated_prompts_do_not_change_scores(monkeypatch, count):
  monkeypatch.setattr(device_rewards, "_CHUNK", 2)
  model = Counting()
  images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.full((4, 4, 3), 51, np.uint8)
  prompts = ["a", "bb", "a", "ccc", "bb"][:count]
  got = device_rewards.host_reward(model)(images, prompts, None)
  np.testing.assert_allclose(got, [0.2 * i + 2 * len(p) for i, p in enumerate(prompts)], rtol=1e-6)
  assert model.tokenized == [list(dict.fromkeys(prompts))]


def test_two_rewards_of_one_model_and_their_weighted_sum():
  images, prompts = _drawn(3)
  scorer = rewards.make(
    {"clipscore": 1.0, "pickscore": 0.5}, options={"clipscore": CLIP, "pickscore": CLIP}
  )
  scores = scorer(images, prompts)
  np.testing.assert_allclose(
    scores["mean"], scores["clipscore"] + 0.5 * scores["pickscore"], rtol=1e-6
  )
  # The sizes are equal, so no resize tells the two apart: only the temperature does.
  model = device_rewards.load("pickscore", CLIP)
  scale = np.exp(float(model.params["logit_scale"])) / 26
  np.testing.assert_allclose(scores["pickscore"], scale * scores["clipscore"], rtol=1e-4)


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("pickscore", {}, "'pickscore': missing a required argument: 'directory'"),
    ("hpsv2", CLIP, "'hpsv2': missing a required argument: 'weights'"),
    ("aesthetic", CLIP | {"weigths": "x"}, "'aesthetic': missing a required|unexpected keyword"),
    ("imagereward", {"weights": "a", "tokeniser": "b"}, "'imagereward'"),
    ("clipscore", CLIP | {"dtype": "float33"}, "'float33' is no dtype"),
  ],
)
def test_wrong_options_are_mistakes_also_in_evaluation(name, options, message):
  with pytest.raises(device_rewards.OptionError, match=message):
    device_rewards.load(name, options)
  with pytest.raises(UserError, match=message):
    rewards.make({name: 1.0}, options={name: options}, allow_unavailable=True)


def test_missing_files_are_named(tmp_path):
  for name in ("hpsv2", "aesthetic"):
    with pytest.raises(UserError, match="head.pt is not a file"):
      device_rewards.load(name, CLIP | {"weights": tmp_path / "head.pt"})
  with pytest.raises(UserError, match="med_config.json"):
    device_rewards.load("imagereward", {"weights": tmp_path / "i.pt", "tokenizer": tmp_path})


def test_dtype_by_name():
  model = device_rewards.load("clipscore", CLIP | {"dtype": "bfloat16"})
  assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
  images, prompts = _drawn(2)
  score = jax.jit(lambda p, x, ids: model.score(p, x, model.text_features(p, ids)))
  assert score(model.params, images / 255, model.tokenize(prompts)).dtype == jnp.float32


def test_back_propagation_takes_its_own_function():
  latents = jax.random.uniform(jax.random.key(0), (12, 2, 2, 3))
  text = {"bright": jnp.ones((12, 1))}
  plain = toy.scoring()
  other = plain._replace(gradient={"bright": lambda p, x, text: jnp.full(len(x), 4.0)})
  found = [score_latents(latents, text, toy.frozen(), s, ("bright",)) for s in (plain, other)]
  np.testing.assert_array_equal(found[0].weighted_reward, found[0].rewards["bright"])
  np.testing.assert_array_equal(found[1].rewards["bright"], found[0].rewards["bright"])
  np.testing.assert_array_equal(found[1].weighted_reward, 4.0)
  assert np.abs(found[0].reward_grad).min() > 0 and np.abs(found[1].reward_grad).max() == 0


def test_a_reward_without_gradients_cannot_be_back_propagated():
  config = load_config(str(CONFIGS / "tiny_stage2.py"))
  with config.unlocked():
    config.rewards.geneval.backpropagate = True
  with pytest.raises(UserError, match="rewards.geneval.backpropagate is true, but only clipscore"):
    build(config)


@pytest.mark.slow
def test_several_rewards_are_back_propagated_together():
  config = load_config(str(CONFIGS / "tiny_stage2.py"))
  with config.unlocked():
    config.rewards.pickscore = dict(weight=0.5, backpropagate=True, compat=True, **CLIP)
  setup = build(config)
  assert setup.scoring.differentiable == ("clipscore", "pickscore")
  prompts = [p.text for p in setup.prompts[:2]]
  text = jax.device_put(setup.cache(prompts)["reward_text"])
  latents = jax.random.normal(jax.random.key(1), (2, *setup.roles.latent_shape))

  def gradient(*names):
    run = lambda x: score_latents(x, text, setup.frozen, setup.scoring, names).reward_grad  # noqa: E731
    return jax.jit(run)(latents)

  both = gradient("clipscore", "pickscore")
  parts = [gradient("clipscore"), gradient("pickscore")]
  assert all(float(jnp.abs(part).max()) > 0 for part in parts)
  np.testing.assert_allclose(both, parts[0] + parts[1], rtol=1e-3, atol=1e-3 * np.abs(both).max())
