"""PickScore against transformers' CLIPModel and image processor."""

import numpy as np
import pytest

from rtdmd_jax.rewards.device.pickscore import PickScore

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402

from tests.support import clip_files as files  # noqa: E402  after torch is known to be there

pytestmark = pytest.mark.parity
SHAPES = [(40, 40), (33, 52)]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  directory = tmp_path_factory.mktemp("pickscore")
  return directory, *files.write_clip(directory)


def _score(pretrained, pixels):
  """The published formula on preprocessed pixels."""
  _, model, tokenizer = pretrained
  rows = tokenizer(files.PROMPTS, padding=True, truncation=True, max_length=files.LENGTH)
  out = model(
    input_ids=torch.tensor(rows["input_ids"]),
    attention_mask=torch.tensor(rows["attention_mask"]),
    pixel_values=pixels,
  )
  cosine = (files.unit(out.text_embeds) * files.unit(out.image_embeds)).sum(-1)
  return model.logit_scale.exp() * cosine / 26


@pytest.mark.parametrize("shape", SHAPES)
def test_compat_scores_equal_the_published_pipeline(pretrained, shape):
  images = files.photos(3, *shape)
  processor = CLIPImageProcessorPil.from_pretrained(pretrained[0])
  with torch.no_grad():
    pixels = processor(images=list(images), return_tensors="pt")["pixel_values"].float()
    want = _score(pretrained, pixels).numpy()
  got, gradient = files.run(PickScore.from_pretrained(pretrained[0], compat=True), images)
  assert np.ptp(want) > 0.1
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  assert np.abs(gradient).max() == 0  # rounding has none


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.slow
@pytest.mark.parametrize("compat", [False, True])
def test_gradient_equals_torch(pretrained, shape, compat):
  images = files.photos(3, *shape)
  leaf = files.leaf(images)
  pixels = files.resize_and_crop(leaf, "bilinear" if compat else "bicubic", down=not compat)
  want = _score(pretrained, pixels)
  want.sum().backward()
  reward = PickScore.from_pretrained(pretrained[0], compat=compat)
  got, gradient = files.run(reward, images, "gradient_score")
  np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-4, atol=1e-5)
  files.assert_gradient(gradient, leaf.grad)
  assert compat or reward.transform is reward.gradient_transform


def test_processor_files_may_lie_elsewhere(pretrained, tmp_path):
  directory = pretrained[0]
  for name in ("config.json", "model.safetensors"):
    (tmp_path / name).symlink_to(directory / name)
  got = PickScore.from_pretrained(tmp_path, processor=directory)
  want = PickScore.from_pretrained(directory)
  assert got.transform == want.transform
  np.testing.assert_array_equal(got.tokenize(files.PROMPTS), want.tokenize(files.PROMPTS))
