"""Back ends of rewards as far as they need no torch."""

import sys
import types

import numpy as np
import pytest
from PIL import Image

from rtdmd_jax import rewards
from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.backends import mask2former
from tests.support.reward_faults import numbered


def test_classes_and_colours():
  assert len(mask2former.CLASSES) == len(set(mask2former.CLASSES)) == 80
  assert len(mask2former.COLORS) == len(set(mask2former.COLORS)) == 10


def test_an_object_is_cut_out_on_grey():
  image = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
  mask = np.zeros((6, 8), bool)
  mask[2:5, 3:7] = True
  mask[2, 3] = False
  assert mask2former.box_of(mask) == (3.0, 2.0, 7.0, 5.0)
  crop = mask2former.cut_out(image, mask)
  assert crop.shape == (3, 4, 3) and crop.dtype == np.uint8
  np.testing.assert_array_equal(crop[0, 0], 0x99)
  np.testing.assert_array_equal(crop[1:], image[3:5, 3:7])


@pytest.mark.parametrize(
  ("shape", "size", "padded"),
  [
    ((512, 512), (800, 800), (800, 800)),
    ((100, 150), (800, 1200), (800, 1216)),
    ((300, 100), (1333, 444), (1344, 448)),
  ],
)
def test_the_detectors_input(shape, size, padded):
  images = np.full((2, *shape, 3), 255, np.uint8)
  inputs, found = mask2former.resized(images)
  assert found == size and inputs.shape == (2, *padded, 3)
  np.testing.assert_allclose(
    inputs[1, 0, 0], (1 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225], rtol=1e-5
  )
  assert not inputs[:, size[0] :].any() and not inputs[:, :, size[1] :].any()


@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (224, 224), (500, 300)])
def test_clips_input_is_the_middle(shape):
  crop = np.full((*shape, 3), 255, np.uint8)
  found = mask2former.clip_input(crop)
  assert found.shape == (224, 224, 3) and np.ptp(found[..., 0]) == 0


class FakeHPSv3:
  """Mean pixel and prompt length, with a second column that must not be used."""

  def __init__(self, config_path, checkpoint_path, device):
    self.loaded = (config_path, checkpoint_path, device)
    self.batches = []

  def reward(self, image_paths, prompts):
    self.batches.append(len(prompts))
    means = [np.asarray(Image.open(path))[..., 0].mean() for path in image_paths]
    return [[m + 100 * len(p), -1.0] for m, p in zip(means, prompts, strict=True)]


def test_hpsv3_is_called_by_keyword_in_batches(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "hpsv3", types.SimpleNamespace(HPSv3RewardInferencer=FakeHPSv3))
  (tmp_path / "HPSv3.safetensors").touch()
  options = {"directory": str(tmp_path), "device": "cpu", "batch": 2}
  scorer = rewards.make({"hpsv3": 1.0}, options={"hpsv3": options})
  scores = scorer(numbered(5), ["", "a", "", "ab", ""])["hpsv3"]
  np.testing.assert_array_equal(scores, [0, 101, 2, 203, 4])
  model = scorer.rewards["hpsv3"]._model
  assert model.batches == [2, 2, 1]
  assert model.loaded == (None, str(tmp_path / "HPSv3.safetensors"), "cpu")
  with pytest.raises(UserError, match="HPSv3.safetensors does not exist"):
    rewards.make({"hpsv3": 1.0}, options={"hpsv3": {"directory": "."}})


@pytest.mark.parametrize(
  ("name", "options", "missing", "message"),
  [
    ("hpsv3", {"directory": "HERE"}, "hpsv3", "needs the package hpsv3"),
    ("geneval", {"detector": "mask2former", "directory": "d", "clip": "c"}, "torch", r"\[judges\]"),
    ("geneval", {"detector": "mask2former", "directory": "d"}, "torch", "argument: 'clip'"),
    ("geneval2", {"directory": "d"}, "torch", r"\[judges\]"),
    ("ocr", {}, "rapidocr", r"\[ocr\]"),
  ],
)
def test_what_is_missing_is_named(name, options, missing, message, monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, missing, None)
  (tmp_path / "HPSv3.safetensors").touch()
  options = {k: str(tmp_path) if v == "HERE" else v for k, v in options.items()}
  with pytest.raises(UserError, match=message):
    rewards.make({name: 1.0}, options={name: options})
