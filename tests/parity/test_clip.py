"""CLIP against transformers in float32; 1e-4 leaves room for the order of summation only."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.errors import UserError
from rtdmd_jax.models import clip
from rtdmd_jax.models.encoders import clip_text_table, load_clip, load_clip_text
from rtdmd_jax.weights.safetensors import load_params, read_config, save_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
TOLERANCE = 1e-4
EOS = 40

TEXT = dict(
  hidden_size=48,
  intermediate_size=96,
  projection_dim=20,
  num_hidden_layers=3,
  num_attention_heads=4,
  vocab_size=50,
  max_position_embeddings=12,
  bos_token_id=1,
  eos_token_id=EOS,
)
# 80 / 5 = 16 and a width that is no multiple of 64, as in ViT-H/14.
VISION = dict(
  hidden_size=80,
  intermediate_size=112,
  projection_dim=20,
  num_hidden_layers=3,
  num_attention_heads=5,
  image_size=24,
  patch_size=8,
  layer_norm_eps=1e-4,
)


def _randomise(model):
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return model.eval()


def _text_model(name, **changes):
  return _randomise(getattr(transformers, name)(transformers.CLIPTextConfig(**TEXT | changes)))


def _clip_model(act="quick_gelu"):
  config = transformers.CLIPConfig(
    text_config=TEXT | {"hidden_act": act},
    vision_config=VISION | {"hidden_act": act},
    projection_dim=20,
  )
  return _randomise(transformers.CLIPModel(config))


def _ids():
  """Two rows that end early, padded with the end token and with 0; ids above the end token too."""
  ids = np.random.default_rng(0).integers(2, EOS, (3, 12))
  ids[0, 5:] = EOS
  ids[1, 7], ids[1, 8:] = EOS, 0
  ids[2, 11] = EOS
  ids[2, 3] = EOS + 4
  return ids


def _check_text(model, directory, hidden=True):
  model.save_pretrained(directory)
  module, params = load_clip_text(directory)
  ids = _ids()
  with torch.no_grad():
    want = model(torch.tensor(ids), output_hidden_states=True)
  got = jax.jit(lambda p, i: module.apply({"params": p}, i, hidden=True))(params, ids)
  np.testing.assert_allclose(got.last, want.last_hidden_state.numpy(), atol=TOLERANCE)
  assert got.hidden.shape[0] == len(want.hidden_states) == TEXT["num_hidden_layers"] + 1
  for mine, theirs in zip(got.hidden, want.hidden_states, strict=True):
    np.testing.assert_allclose(mine, theirs.numpy(), atol=TOLERANCE)
  return got, want


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [EOS, 2], ids=["first_eos", "highest_id"])
def test_text_with_projection(tmp_path, act, eos):
  model = _text_model("CLIPTextModelWithProjection", hidden_act=act, eos_token_id=eos)
  got, want = _check_text(model, tmp_path)
  np.testing.assert_allclose(got.projected, want.text_embeds.numpy(), atol=TOLERANCE)
  assert np.abs(want.text_embeds.numpy()).max() > 0.1


def test_pooling_rules_differ(tmp_path):
  first, _ = _check_text(_text_model("CLIPTextModelWithProjection"), tmp_path / "a")
  changed = _text_model("CLIPTextModelWithProjection", eos_token_id=2)
  highest, _ = _check_text(changed, tmp_path / "b")
  np.testing.assert_array_equal(first.pooled[:2], highest.pooled[:2])
  assert np.abs(first.pooled[2] - highest.pooled[2]).max() > 0.1


def test_text_without_projection_in_both_spellings(tmp_path):
  model = _text_model("CLIPTextModel")
  got, want = _check_text(model, tmp_path / "new")
  np.testing.assert_allclose(got.pooled, want.pooler_output.numpy(), atol=TOLERANCE)
  assert got.projected is None
  # Published text encoders have every key under `text_model`.
  _, params = load_clip_text(tmp_path / "new")
  model.config.architectures = ["CLIPTextModel"]
  model.config.save_pretrained(tmp_path / "old")
  save_params(tmp_path / "old" / "model.safetensors", params, clip.TABLE)
  assert clip_text_table(tmp_path / "old") is not clip_text_table(tmp_path / "new")
  module, again = load_clip_text(tmp_path / "old")
  run = jax.jit(lambda p: module.apply({"params": p}, _ids()))
  out = run(again)
  np.testing.assert_array_equal(out.pooled, run(params).pooled)
  assert out.hidden is None


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_both_towers_and_image_gradient(tmp_path, act):
  model = _clip_model(act)
  model.save_pretrained(tmp_path)
  module, params = load_clip(tmp_path)
  pixels = np.random.default_rng(1).normal(size=(2, 24, 24, 3)).astype(np.float32)
  leaf = torch.tensor(pixels.transpose(0, 3, 1, 2), requires_grad=True)
  want = model(input_ids=torch.tensor(_ids()), pixel_values=leaf)
  want.logits_per_image.square().sum().backward()

  def logits(x):
    text, image, scale = module.apply({"params": params}, _ids(), x)
    text /= jnp.linalg.norm(text, axis=-1, keepdims=True)
    image /= jnp.linalg.norm(image, axis=-1, keepdims=True)
    out = jnp.exp(scale) * image @ text.T
    return jnp.square(out).sum(), (out, text, image)

  run = jax.jit(jax.value_and_grad(logits, has_aux=True))
  (_, (got, text, image)), gradient = run(pixels)
  np.testing.assert_allclose(text, want.text_embeds.detach().numpy(), atol=TOLERANCE)
  np.testing.assert_allclose(image, want.image_embeds.detach().numpy(), atol=TOLERANCE)
  np.testing.assert_allclose(got, want.logits_per_image.detach().numpy(), atol=5e-4)
  expected = leaf.grad.numpy().transpose(0, 2, 3, 1)
  np.testing.assert_allclose(gradient, expected, atol=2e-3, rtol=1e-3)


def test_vision_alone(tmp_path):
  config = transformers.CLIPVisionConfig(**VISION)
  model = _randomise(transformers.CLIPVisionModelWithProjection(config))
  model.save_pretrained(tmp_path)
  module = clip.CLIPVision(clip.VisionConfig.from_dict(read_config(tmp_path)))
  pixels = np.random.default_rng(1).normal(size=(2, 24, 24, 3)).astype(np.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), pixels)["params"]
  params = load_params(tmp_path, shapes, clip.TABLE)
  with torch.no_grad():
    want = model(torch.tensor(pixels.transpose(0, 3, 1, 2))).image_embeds.numpy()
  np.testing.assert_allclose(module.apply({"params": params}, pixels), want, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"])
def test_written_weights_load_in_transformers(tmp_path, name):
  model = _clip_model() if name == "CLIPModel" else _text_model(name)
  model.save_pretrained(tmp_path)
  load = load_clip if name == "CLIPModel" else load_clip_text
  _, params = load(tmp_path)
  # The published spelling, which transformers reads back for every class.
  save_params(tmp_path / "model.safetensors", params, clip.TABLE)
  again, info = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
  assert not any(info.values())
  want, got = model.state_dict(), again.state_dict()
  assert got.keys() == want.keys()
  for key in want:
    assert torch.equal(got[key], want[key]), key


@pytest.mark.parametrize(
  ("text", "vision", "count"),
  [
    (dict(hidden_size=768, num_hidden_layers=12), dict(hidden_size=1024), 427_616_513),
    (dict(hidden_size=1024, num_hidden_layers=24), dict(hidden_size=1280), 986_109_441),
  ],
  ids=["ViT-L/14", "ViT-H/14"],
)
def test_published_sizes(text, vision, count):
  text |= dict(intermediate_size=4 * text["hidden_size"])
  text |= dict(num_attention_heads=text["hidden_size"] // 64)
  layers = {1024: 24, 1280: 32}[vision["hidden_size"]]
  vision |= dict(intermediate_size=4 * vision["hidden_size"], num_hidden_layers=layers)
  vision |= dict(num_attention_heads=16, patch_size=14)
  config = transformers.CLIPConfig(
    text_config=text, vision_config=vision, projection_dim=text["hidden_size"]
  )
  with torch.device("meta"):
    model = transformers.CLIPModel(config)
  module = clip.CLIP(clip.CLIPConfig.from_dict(json.loads(config.to_json_string(use_diff=False))))
  inputs = np.zeros((1, 1), np.int32), np.zeros((1, 224, 224, 3), np.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
  got = {key: e.shape for e in clip.TABLE.entries(shapes) for key in e.keys}
  assert got == {k: tuple(v.shape) for k, v in model.state_dict().items()}
  assert sum(int(np.prod(shape)) for shape in got.values()) == count


def test_class_without_projection_flag_is_refused(tmp_path):
  model = _text_model("CLIPTextModel")
  model.save_pretrained(tmp_path)
  config = read_config(tmp_path) | {"architectures": ["CLIPModel"]}
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match="architectures.*CLIPModel"):
    load_clip_text(tmp_path)
