"""The aesthetic predictor against its published steps in torch."""

import jax
import numpy as np
import pytest

from rtdmd_jax.rewards.device.aesthetic import Aesthetic

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402

from tests.support import clip_files as files  # noqa: E402  after torch is known to be there

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  directory = tmp_path_factory.mktemp("aesthetic")
  model, _ = files.write_clip(directory, act="quick_gelu")
  head = files.AestheticHead(files.TINY.projection).eval()
  torch.save(head.state_dict(), directory / "head.pth")
  return directory, model, head


def _score(pretrained, pixels):
  _, model, head = pretrained
  pooled = model.vision_model(pixel_values=pixels).pooler_output
  return head.layers(files.unit(model.visual_projection(pooled)))[:, 0]


@pytest.mark.parametrize("compat", [False, True])
def test_score_and_gradient(pretrained, compat):
  directory, _, _ = pretrained
  images = files.photos(3, 33, 52)
  leaf = files.leaf(images)
  want = _score(pretrained, files.resize_and_crop(leaf, "bicubic", down=True))
  want.sum().backward()
  reward = Aesthetic.from_pretrained(directory / "head.pth", directory, compat=compat)
  got, gradient = files.run(reward, images, "gradient_score")
  np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-4)
  files.assert_gradient(gradient, leaf.grad)
  processor = CLIPImageProcessorPil.from_pretrained(directory)
  with torch.no_grad():
    pixels = processor(images=list(images), return_tensors="pt")["pixel_values"].float()
    published = _score(pretrained, pixels).numpy()
  scored, _ = files.run(reward, images)
  assert np.ptp(published) > 1e-3
  tolerance = 1e-4 if compat else 1e-2
  np.testing.assert_allclose(scored, published, rtol=tolerance)


def test_an_image_encoder_alone_will_do(pretrained, tmp_path):
  directory, model, _ = pretrained
  import transformers

  config = model.config.vision_config
  alone = transformers.CLIPVisionModelWithProjection(config).eval()
  own = {k: v for k, v in model.state_dict().items() if k.startswith("vis")}
  alone.load_state_dict(own)
  alone.save_pretrained(tmp_path)
  files.write_processor(tmp_path)
  a, b = (Aesthetic.from_pretrained(directory / "head.pth", d) for d in (directory, tmp_path))
  assert a.transform == b.transform and a.module == b.module
  jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
