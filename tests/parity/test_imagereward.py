"""ImageReward against transformers' BLIP."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.errors import UserError
from rtdmd_jax.models import blip
from rtdmd_jax.models.blip import BlipVisionConfig, ImageRewardNet
from rtdmd_jax.models.med import MedConfig
from rtdmd_jax.rewards.device.imagereward import ImageReward

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
from tests.support import clip_files as files  # noqa: E402  after torch is known to be there
from tests.support.blip_files import blip_reference, write_imagereward  # noqa: E402

pytestmark = pytest.mark.parity
nn = torch.nn
SIDE = files.SIDE
VISION = BlipVisionConfig(
  hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8
)
PROMPTS = ["a red cube", "two blue cubes left of a red one, " * 5, "cube"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  directory = tmp_path_factory.mktemp("imagereward")
  return directory, write_imagereward(directory, VISION)


def _load(directory, **options):
  return ImageReward.from_pretrained(directory / "ImageReward.pt", directory, **options)


def _score(model, reward, pixels):
  ids = torch.tensor(reward.tokenize(PROMPTS)).long()
  return model(ids, (ids != 0).long(), pixels)


def _pillow(images):
  """Resize of the short side, middle square, normalisation: the package's transform."""
  out = []
  for image in images:
    height, width = image.shape[:2]
    short = min(height, width)
    size = SIDE * width // short, SIDE * height // short
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    top, left = (round((n - SIDE) / 2) for n in small.shape[:2])
    out.append(small[top : top + SIDE, left : left + SIDE].transpose(2, 0, 1) / np.float32(255))
  return files.normalise(torch.tensor(np.stack(out)))


@pytest.mark.parametrize("shape", [(40, 40), (33, 52)])
def test_compat_scores_equal_the_published_pipeline(pretrained, shape):
  directory, model = pretrained
  images = files.photos(3, *shape)
  reward = _load(directory, compat=True)
  with torch.no_grad():
    want = _score(model, reward, _pillow(images)).numpy()
  got, gradient = files.run(reward, images, prompts=PROMPTS)
  assert np.ptp(want) > 0.02
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  assert np.abs(gradient).max() == 0  # rounding has none


@pytest.mark.parametrize("shape", [(40, 40), (33, 52)])
@pytest.mark.slow
@pytest.mark.parametrize("compat", [False, True])
def test_gradient_equals_torch(pretrained, shape, compat):
  directory, model = pretrained
  images = files.photos(3, *shape)
  reward = _load(directory, compat=compat)
  leaf = files.leaf(images)
  if compat:
    x = nn.functional.interpolate(leaf, (SIDE, SIDE), mode="bicubic", align_corners=False)
    pixels = files.normalise(x)
  else:
    pixels = files.resize_and_crop(leaf, "bicubic")
  want = _score(model, reward, pixels)
  want.sum().backward()
  got, gradient = files.run(reward, images, "gradient_score", PROMPTS)
  np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-4, atol=1e-5)
  files.assert_gradient(gradient, leaf.grad)
  assert compat or reward.transform is reward.gradient_transform


def test_prompts_matter_and_padding_does_not(pretrained):
  reward = _load(pretrained[0])
  images = jnp.asarray(files.photos(1, 30, 30) / np.float32(255))
  ids = reward.tokenize(PROMPTS)
  assert ids.shape == (3, 35) and (ids[1] != 0).all() and (ids[0] == 0).any()
  score = jax.jit(reward.score)
  whole, other = (score(reward.params, images, ids[i : i + 1]) for i in (0, 2))
  assert np.abs(whole - other) > 1e-3
  short = score(reward.params, images, ids[:1, : int((ids[0] != 0).sum())])
  np.testing.assert_allclose(short, whole, atol=1e-5)


def test_tokens_equal_berts(pretrained):
  directory, _ = pretrained
  plain = transformers.BertTokenizer.from_pretrained(directory)
  want = plain(PROMPTS, padding="max_length", truncation=True, max_length=35)["input_ids"]
  reward = _load(directory)
  np.testing.assert_array_equal(reward.tokenize(PROMPTS), want)
  size = len(plain)
  assert reward.tokenize(["[DEC] [ENC]"])[0, 1:3].tolist() == [size, size + 1]


def test_mismatched_files_are_refused(pretrained, tmp_path):
  directory, model = pretrained
  with pytest.raises(UserError, match="no tokenizer.json or vocab.txt"):
    ImageReward.from_pretrained(directory / "ImageReward.pt", tmp_path)
  settings = json.loads((directory / "med_config.json").read_text())
  for change, message in (
    (dict(vocab_size=20), "vocab_size .* is 20"),
    (dict(add_cross_attention=False), "add_cross_attention"),
    (dict(num_attention_heads=5), "not a multiple"),
  ):
    (tmp_path / "med_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match=message):
      ImageReward.from_pretrained(tmp_path / "ImageReward.pt", directory)
  (tmp_path / "med_config.json").write_text(json.dumps(settings))
  tensors = model.published()
  del tensors["mlp.layers.7.bias"]
  torch.save(tensors, tmp_path / "ImageReward.pt")
  with pytest.raises(UserError, match=r"lacks key mlp\.layers\.7\.bias"):
    ImageReward.from_pretrained(tmp_path / "ImageReward.pt", directory)


def test_published_size():
  vision, text = BlipVisionConfig(), MedConfig()
  with torch.device("meta"):
    want = {k: tuple(v.shape) for k, v in blip_reference(vision, text).published().items()}
  module = ImageRewardNet(vision, text)
  ids = np.zeros((1, 35), np.int32)
  inputs = ids, ids > 0, np.zeros((1, 224, 224, 3), np.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
  got = {key: e.shape for e in blip.TABLE.entries(shapes) for key in e.keys}
  assert got == want
  assert sum(int(np.prod(shape)) for shape in got.values()) == 446_206_689
