import logging
import re
import sys
import types

import numpy as np
import pytest

from rtdmd_jax import rewards
from rtdmd_jax.datasets.shapes.draw import draw
from rtdmd_jax.datasets.shapes.grammar import all_records
from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards import isolated, multi
from rtdmd_jax.rewards.device.description import RewardDescription

HERE = __name__
BRIGHT, LENGTH, BROKEN = (f"{HERE}:{name}" for name in ("Brightness", "Length", "Broken"))
MISSING, UNNAMED, WRONG = (f"{HERE}:{name}" for name in ("Missing", "Unnamed", "WrongShape"))


class Brightness:
  """Mean pixel in [0, 1] times a gain; black images cannot be scored."""

  def __init__(self, gain=1.0):
    self.gain = gain

  def __call__(self, images, prompts, metadata):
    assert images.dtype == np.uint8
    mean = images.mean(axis=(1, 2, 3)) / 255
    return np.where(mean == 0, np.nan, self.gain * mean)


def Length():
  return lambda images, prompts, metadata: {
    LENGTH: [float(len(p)) for p in prompts],
    "words": [float(len(p.split())) for p in prompts],
  }


def Broken():
  def fail(images, prompts, metadata):
    raise RuntimeError("no memory")

  return fail


def Missing():
  raise FileNotFoundError("weights.safetensors")


def Unnamed():
  return lambda images, prompts, metadata: {"other": np.zeros(len(images))}


def WrongShape():
  return lambda images, prompts, metadata: np.zeros((len(images), 2))


def grey(*levels):
  return np.stack([np.full((4, 4, 3), level, np.float32) for level in levels])


def test_mean_is_the_weighted_sum():
  scorer = rewards.make({BRIGHT: 2.0, LENGTH: 0.5}, options={BRIGHT: {"gain": 3.0}})
  scores = scorer(grey(1.0, 0.2), ["ab", "a b c"])
  np.testing.assert_allclose(scores[BRIGHT], [3.0, 0.6], rtol=1e-6)
  np.testing.assert_allclose(scores["words"], [1.0, 3.0])
  np.testing.assert_allclose(scores["mean"], [2 * 3.0 + 1.0, 2 * 0.6 + 2.5], rtol=1e-6)
  assert all(v.dtype == np.float32 and v.shape == (2,) for v in scores.values())


def test_float_images_are_rounded_to_8_bits():
  scores = rewards.make({BRIGHT: 1.0})(grey(100.4 / 255, 100.6 / 255, 1.7), ["", "", ""])
  np.testing.assert_allclose(scores[BRIGHT] * 255, [100.0, 101.0, 255.0], rtol=1e-6)


def test_failed_samples_are_nan_and_others_keep_their_score():
  scores = rewards.make({BRIGHT: 1.0, LENGTH: 1.0})(grey(0.0, 0.2, np.nan), ["ab", "cd", "ef"])
  np.testing.assert_array_equal(np.isnan(scores[BRIGHT]), [True, False, True])
  np.testing.assert_array_equal(np.isnan(scores[LENGTH]), [False, False, True])
  np.testing.assert_array_equal(np.isnan(scores["mean"]), [True, False, True])


def test_a_reward_of_weight_zero_is_reported_but_not_summed():
  scores = rewards.make({BRIGHT: 0.0, LENGTH: 1.0})(grey(0.0), ["abc"])
  assert np.isnan(scores[BRIGHT][0]) and scores["mean"][0] == 3.0


def test_geneval_with_the_shapes_detector():
  records = all_records()[::90]
  rng = np.random.default_rng(0)
  images = np.stack([draw(record, rng)[0] for record in records])
  scorer = rewards.make({"geneval": 2.0}, options={"geneval": {"detector": "shapes"}})
  scores = scorer(images, [r["prompt"] for r in records], records)
  np.testing.assert_array_equal(scores["geneval"], 1.0)
  np.testing.assert_array_equal(scores["mean"], 2.0)
  assert set(scores["position_accuracy"]) == {1.0, -10.0}
  with pytest.raises(UserError, match="geneval needs a record"):
    scorer(images, [r["prompt"] for r in records])


def Detector(images):
  return [[] for _ in images]


def test_geneval_with_a_detector_by_import_path():
  scorer = rewards.make({"geneval": 1.0}, options={"geneval": {"detector": f"{HERE}:Detector"}})
  assert scorer(grey(1.0), [""], [all_records()[0]])["geneval"] == 0.0


class FakeClip:
  """The methods of ClipScore that the reward calls, with a score that shows its inputs."""

  params = 10.0

  @classmethod
  def describe(cls, read, directory):
    assert directory == "clip"
    return RewardDescription(cls(), cls)

  def tokenize(self, prompts):
    return np.array([[len(prompt)] for prompt in prompts])

  def text_features(self, params, ids):
    return ids * params

  def score(self, params, images, text_features):
    return images.max(axis=(1, 2, 3)) + text_features[:, 0]


def test_clipscore_is_built_from_its_directory(monkeypatch):
  module = types.SimpleNamespace(ClipScore=FakeClip)
  monkeypatch.setitem(sys.modules, "rtdmd_jax.rewards.device.clipscore", module)
  scorer = rewards.make({"clipscore": 1.0}, options={"clipscore": {"directory": "clip"}})
  scores = scorer(grey(1.0, 0.2), ["a", "bcd"])
  np.testing.assert_allclose(scores["clipscore"], [1.0 + 10, 0.2 + 30], rtol=1e-6)


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize(
  ("names", "options", "message"),
  [
    ({"genevl": 1.0}, {}, "did you mean 'geneval'"),
    ({"quux": 1.0}, {}, "known: clipscore, .*geneval"),
    ({"geneval": 1.0}, {"genevel": {}}, "reward options: unknown reward 'genevel'"),
    ({"geneval": 1.0}, {}, "needs one of the options url, detector"),
    ({"geneval": 1.0}, {"geneval": {"detectr": "shapes"}}, "'geneval'"),
    ({BRIGHT: 1.0}, {BRIGHT: {"gian": 1}}, "unexpected keyword argument 'gian'"),
    ({BRIGHT: float("nan")}, {}, "finite number"),
    ({BRIGHT: "1"}, {}, "finite number"),
    ({}, {}, "none is configured"),
  ],
)
def test_mistakes_are_user_errors_also_in_evaluation(names, options, message, allow):
  with pytest.raises(UserError, match=message):
    rewards.make(names, options=options, allow_unavailable=allow)


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    (MISSING, {}, "FileNotFoundError: weights.safetensors"),
    ("no.such.module:Name", {}, "cannot import"),
    (f"{HERE}:Absent", {}, "cannot import"),
    (f"{HERE}:HERE", {}, "not callable"),
    ("geneval", {"detector": "mask3former"}, "unknown detector 'mask3former'"),
  ],
)
def test_unavailable_reward_ends_training_and_is_skipped_in_evaluation(
  name, options, message, caplog
):
  with pytest.raises(UserError, match=message):
    rewards.make({name: 1.0, LENGTH: 1.0}, options={name: options})
  with caplog.at_level(logging.WARNING):
    scorer = rewards.make({name: 1.0, LENGTH: 1.0}, options={name: options}, allow_unavailable=True)
  assert message in scorer.unavailable[name] and message in caplog.text
  assert scorer.weights == {LENGTH: 1.0}
  assert scorer(grey(1.0), ["ab"])["mean"] == 2.0
  with pytest.raises(UserError, match="no reward is left"):
    rewards.make({name: 1.0}, options={name: options}, allow_unavailable=True)


def test_a_failing_call_ends_training_and_is_nan_in_evaluation(caplog):
  weights = {BROKEN: 1.0, LENGTH: 1.0}
  with pytest.raises(UserError, match=r"Broken' failed: RuntimeError: no memory \(.*test_multi.py"):
    rewards.make(weights)(grey(1.0), ["ab"])
  with caplog.at_level(logging.WARNING):
    scores = rewards.make(weights, allow_unavailable=True)(grey(1.0), ["ab"])
  assert np.isnan(scores[BROKEN][0]) and np.isnan(scores["mean"][0]) and scores[LENGTH][0] == 2.0
  assert "no memory" in caplog.text


def Leaves():
  return lambda images, prompts, metadata: sys.exit("no display")


def TakesOneArgument():
  return lambda images: np.ones(len(images))


def Infinite():
  return lambda images, prompts, metadata: [np.inf if p == "ab" else 2.0 for p in prompts]


def Picky():
  """Refuses the batch for one prompt of it."""

  def score(images, prompts, metadata):
    if any(record is None for record in metadata):
      raise UserError("a prompt has no record")
    return np.ones(len(images))

  return score


def Words():
  return lambda images, prompts, metadata: {
    f"{HERE}:Words": np.ones(len(images)),
    "words": np.zeros(len(images)),
  }


def Service():
  """Keeps why it has no scores, as a remote reward does."""

  def score(images, prompts, metadata):
    return np.full(len(images), np.nan)

  score.last_failure = "nobody answers"
  return score


@pytest.mark.parametrize(
  ("name", "scores", "reason"),
  [
    ("Broken", [np.nan, np.nan], "RuntimeError: no memory"),
    ("Leaves", [np.nan, np.nan], "SystemExit: no display"),
    ("TakesOneArgument", [np.nan, np.nan], "TypeError: .* takes 1 positional argument but 3"),
    ("Unnamed", [np.nan, np.nan], "ValueError: .*without its own name"),
    ("WrongShape", [np.nan, np.nan], r"ValueError: .*has shape \(2, 2\), not \[2\]"),
    ("Infinite", [np.nan, 2.0], "it gave no score and no reason"),
    ("Service", [np.nan, np.nan], "nobody answers"),
    ("Picky", [1.0, np.nan], "a prompt has no record"),
    ("Missing", [np.nan, np.nan], "left out since the start: FileNotFoundError: weights"),
    ("Words", [np.nan, np.nan], "it returns 'words', which is taken by another reward"),
  ],
)
def test_in_an_evaluation_a_reward_fails_alone_and_says_why(name, scores, reason):
  scorer = multi.make_for_evaluation({LENGTH: {}, f"{HERE}:{name}": {}})
  images = np.zeros((2, 4, 4, 3), np.uint8)
  found = scorer.isolated(images, ["ab", "c"], [{}, None])
  np.testing.assert_array_equal(found.values[f"{HERE}:{name}"], np.float32(scores))
  np.testing.assert_array_equal(found.values[LENGTH], [2.0, 1.0])
  assert found.failed(f"{HERE}:{name}") == np.isnan(scores).sum()
  assert list(found.reasons) == [f"{HERE}:{name}"]
  assert re.search(reason, found.reasons[f"{HERE}:{name}"])
  alone = scorer.isolated(images, ["ab", "c"], names=[LENGTH])
  assert set(alone.values) == {LENGTH, "words"} and not alone.reasons


def test_a_trained_reward_is_isolated_in_evaluations_too():
  scorer = rewards.make({BROKEN: 1.0, LENGTH: 1.0}, options={BROKEN: {"max_failed": 0.0}})
  found = scorer.isolated(grey(1.0, np.nan), ["ab", "c"])
  np.testing.assert_array_equal(found.values[LENGTH], np.float32([2.0, np.nan]))
  assert found.reasons[LENGTH] == "the image has pixels that are not finite"
  assert found.reasons[BROKEN] == "RuntimeError: no memory"


def test_a_failing_call_of_many_images_costs_its_part_alone(monkeypatch):
  monkeypatch.setattr(isolated, "_CALL", 2)

  def score(images, prompts, metadata):
    if "bad" in prompts:
      raise OSError("lost")
    return {"r": np.ones(len(images)), "more": np.ones(len(images))}

  images = np.zeros((5, 2, 2, 3), np.uint8)
  found = isolated.score_isolated({"r": score}, images, ["a", "b", "c", "bad", "e"], None)
  for name in ("r", "more"):
    np.testing.assert_array_equal(found.values[name], np.float32([1, 1, np.nan, np.nan, 1]))
  assert found.reasons == {"r": "OSError: lost"}


@pytest.mark.parametrize(
  ("name", "message"), [(UNNAMED, "without its own name"), (WRONG, r"not \[1\]")]
)
def test_malformed_outputs_are_refused(name, message):
  with pytest.raises(UserError, match=message):
    rewards.make({name: 1.0})(grey(1.0), [""])


@pytest.mark.parametrize(
  ("images", "prompts", "metadata", "message"),
  [
    (np.zeros((4, 4, 3)), [""], None, "B, H, W, 3"),
    (np.zeros((1, 4, 4, 3), np.int32), [""], None, "uint8 or floating"),
    (np.zeros((1, 4, 4, 3)), ["", ""], None, "1 images, 2 prompts, no records"),
    (np.zeros((1, 4, 4, 3)), [""], [], "0 records"),
  ],
)
def test_malformed_input_is_refused(images, prompts, metadata, message):
  with pytest.raises(ValueError, match=message):
    rewards.make({LENGTH: 1.0})(images, prompts, metadata)
