"""HPSv2 against a torch model with open_clip's published structure and names."""

import jax
import numpy as np
import pytest

from rtdmd_jax.errors import UserError
from rtdmd_jax.models import clip
from rtdmd_jax.models.clip_config import TextConfig, VisionConfig
from rtdmd_jax.rewards.device.hpsv2 import HPSv2
from rtdmd_jax.weights.open_clip import to_transformers

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from tests.support import clip_files as files  # noqa: E402  after torch is known to be there
from tests.support.open_clip_files import OpenClip, write_open_clip  # noqa: E402

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  directory = tmp_path_factory.mktemp("hpsv2")
  return directory, *write_open_clip(directory)


def _ids(tokenizer):
  """Start, words, end, zeros; the entity is a plain character by then."""
  prompts = [p.replace("&amp;", "&") for p in files.PROMPTS]
  ids = torch.zeros(len(prompts), files.LENGTH, dtype=torch.long)
  for row, prompt in zip(ids, prompts, strict=True):
    tokens = tokenizer(prompt)["input_ids"]
    tokens = [*tokens[: files.LENGTH - 1], tokens[-1]] if len(tokens) > files.LENGTH else tokens
    row[: len(tokens)] = torch.tensor(tokens)
  return ids


def _pad(x):
  """Longest side to SIDE by antialiased cubic, then black around."""
  scale = files.SIDE / max(x.shape[2:])
  size = [round(n * scale) for n in x.shape[2:]]
  if scale != 1:
    x = torch.nn.functional.interpolate(x, size, mode="bicubic", antialias=True)
  free = [files.SIDE - n for n in size]
  sides = free[1] // 2, free[1] - free[1] // 2, free[0] // 2, free[0] - free[0] // 2
  return files.normalise(torch.nn.functional.pad(x, sides))


@pytest.mark.parametrize("shape", [(40, 40), (24, 24), (33, 52), (45, 20)])
def test_preprocessing(pretrained, shape):
  images = files.photos(2, *shape)
  want = _pad(files.leaf(images)).detach().numpy().transpose(0, 2, 3, 1)
  directory = pretrained[0]
  reward = HPSv2.from_pretrained(directory / "hps.pt", directory)
  assert reward.transform is reward.gradient_transform
  np.testing.assert_allclose(reward.transform(images / np.float32(255)), want, atol=1e-5)
  compat = HPSv2.from_pretrained(directory / "hps.pt", directory, compat=True)
  assert compat.gradient_transform == reward.transform
  np.testing.assert_allclose(compat.transform(images / np.float32(255)), want, atol=1e-5)


def test_features_score_and_gradient(pretrained):
  directory, model, tokenizer = pretrained
  images = files.photos(3, 33, 52)
  leaf = files.leaf(images)
  image, text = model.visual(_pad(leaf)), model.encode_text(_ids(tokenizer))
  want = (files.unit(image) * files.unit(text)).sum(-1)
  want.sum().backward()
  reward = HPSv2.from_pretrained(directory / "hps.pt", directory)
  got, gradient = files.run(reward, images)
  np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-4, atol=1e-5)
  files.assert_gradient(gradient, leaf.grad)
  features = jax.jit(reward.text_features)(reward.params, reward.tokenize(files.PROMPTS))
  np.testing.assert_allclose(features, files.unit(text).detach().numpy(), atol=1e-4)
  features = jax.jit(reward.image_features)(reward.params, images / np.float32(255))
  np.testing.assert_allclose(features, files.unit(image).detach().numpy(), atol=1e-4)


def test_compat_rounds_before_it_scores(pretrained):
  directory, _, _ = pretrained
  images = files.photos(3, 40, 40) / np.float32(255)
  shifted = np.clip(images + 0.4 / 255, 0, 1)
  reward = HPSv2.from_pretrained(directory / "hps.pt", directory, compat=True)
  got, gradient = files.run(reward, shifted)
  np.testing.assert_array_equal(got, files.run(reward, images)[0])
  assert np.abs(gradient).max() == 0


def test_tokens_are_open_clips(pretrained):
  directory, _, tokenizer = pretrained
  reward = HPSv2.from_pretrained(directory / "hps.pt", directory)
  np.testing.assert_array_equal(reward.tokenize(files.PROMPTS), _ids(tokenizer).numpy())


def test_a_foreign_tensor_is_refused(pretrained, tmp_path):
  directory, model, _ = pretrained
  tensors = dict(model.state_dict()) | {"visual.attn_pool.query": torch.zeros(3)}
  torch.save(tensors, tmp_path / "other.pt")
  with pytest.raises(UserError, match=r"other\.pt holds key visual\.attn_pool\.query"):
    HPSv2.from_pretrained(tmp_path / "other.pt", directory)


def test_published_size():
  with torch.device("meta"):
    published = files.Sizes((1024, 16, 24), (1280, 16, 32), 14, 224, 77, 1024)
    model = OpenClip(49408, published)
  tensors = {
    key: np.broadcast_to(np.float32(0), value.shape) for key, value in model.state_dict().items()
  }
  shared = dict(hidden_act="gelu", num_attention_heads=16)
  text = TextConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, projection_dim=1024, **shared
  )
  vision = VisionConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, patch_size=14, **shared
  )
  module = clip.CLIP(clip.CLIPConfig(text, vision, projection_dim=1024))
  inputs = np.zeros((1, 1), np.int32), np.zeros((1, 224, 224, 3), np.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
  want = {key: e.shape for e in clip.TABLE.entries(shapes) for key in e.keys}
  assert {key: value.shape for key, value in to_transformers(tensors).items()} == want
  assert sum(int(np.prod(shape)) for shape in want.values()) == 986_109_441
