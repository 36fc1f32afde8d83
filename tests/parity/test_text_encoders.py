"""CLIP and T5 against transformers in float32; 1e-4 leaves room for the order of summation only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.models import clip, t5
from rtdmd_jax.weights.safetensors import load_params, read_config, save_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
TOLERANCE = 1e-4
TEXT = dict(
  vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
  max_position_embeddings=12, projection_dim=24, bos_token_id=48, eos_token_id=49, pad_token_id=49,
)
VISION = dict(
  hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=5, image_size=24,
  patch_size=8, projection_dim=24,
)


def _ids():
  ids = np.random.default_rng(0).integers(0, 48, (3, 12))
  for row, end in enumerate((4, 7, 11)):
    ids[row, end:] = 49
  return ids


def _randomize(model):
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return model.eval()


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu"}, {"eos_token_id": 2}])
def test_clip_text_equals_transformers(tmp_path, changes):
  config = transformers.CLIPTextConfig(**TEXT | changes)
  reference = _randomize(transformers.CLIPTextModelWithProjection(config))
  reference.save_pretrained(tmp_path)
  model = clip.CLIPText(clip.TowerConfig.from_dict(read_config(tmp_path)))
  ids = _ids()
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.array(ids))["params"]
  params = load_params(tmp_path, shapes, clip.TEXT_TABLE)
  with torch.no_grad():
    expected = reference(torch.tensor(ids), output_hidden_states=True)
  hidden, pooled = model.apply({"params": params}, ids)
  np.testing.assert_allclose(hidden, expected.hidden_states[-2].numpy(), atol=TOLERANCE)
  np.testing.assert_allclose(pooled, expected.text_embeds.numpy(), atol=TOLERANCE)


def test_clip_model_equals_transformers_and_round_trips(tmp_path):
  config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
  reference = _randomize(transformers.CLIPModel(config))
  reference.save_pretrained(tmp_path)
  model = clip.CLIP(clip.CLIPConfig.from_dict(read_config(tmp_path)))
  ids = _ids()
  pixels = np.random.default_rng(1).normal(size=(3, 24, 24, 3)).astype(np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.array(ids), pixels)["params"]
  params = load_params(tmp_path, shapes, clip.CLIP_TABLE)
  with torch.no_grad():
    expected = reference(
      input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2))
    )
  text, image, scale = model.apply({"params": params}, ids, pixels)
  np.testing.assert_allclose(text, expected.text_embeds.numpy(), atol=TOLERANCE)
  np.testing.assert_allclose(image, expected.image_embeds.numpy(), atol=TOLERANCE)
  np.testing.assert_allclose(
    scale * text @ image.T, expected.logits_per_text.numpy(), atol=30 * TOLERANCE
  )
  save_params(tmp_path / "model.safetensors", params, clip.CLIP_TABLE)
  again = transformers.CLIPModel.from_pretrained(tmp_path)
  for name, value in reference.state_dict().items():
    torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["gated-gelu", "relu"])
def test_t5_equals_transformers_and_round_trips(tmp_path, form):
  config = transformers.T5Config(
    vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, feed_forward_proj=form,
    relative_attention_num_buckets=8, relative_attention_max_distance=10,
  )
  reference = _randomize(transformers.T5EncoderModel(config))
  reference.save_pretrained(tmp_path)
  model = t5.T5Encoder(t5.T5Config.from_dict(read_config(tmp_path)))
  ids = np.random.default_rng(0).integers(0, 50, (2, 20))
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.array(ids))["params"]
  params = load_params(tmp_path, shapes, t5.TABLE, ignore=t5.IGNORED_KEYS)
  with torch.no_grad():
    expected = reference(torch.tensor(ids)).last_hidden_state
  actual = model.apply({"params": params}, ids)
  np.testing.assert_allclose(actual, expected.numpy(), atol=TOLERANCE)
  save_params(tmp_path / "model.safetensors", params, t5.TABLE)
  again = transformers.T5EncoderModel.from_pretrained(tmp_path)
  for name, value in reference.state_dict().items():
    torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
