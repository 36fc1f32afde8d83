"""Names and shapes at full size: ours against the state dictionaries of diffusers and transformers.

Nothing is allocated: theirs lie on PyTorch's meta device, ours come from `jax.eval_shape`. Both are
made of the configs in `weights.published`; the counts are written out, so that a config that
changes both sides alike is seen.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.aot.abstract import abstract_pipeline
from rtdmd_jax.models import build_transformer, clip, qwen3, t5, vae_flux2
from rtdmd_jax.pipeline.text import FLUX2_LAYERS
from rtdmd_jax.weights.published import PUBLISHED

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

SD3, SD35 = "stable-diffusion-3-medium-diffusers", "stable-diffusion-3.5-medium"
FLUX1, KLEIN_4B, KLEIN_9B = "FLUX.1-dev", "FLUX.2-klein-base-4B", "FLUX.2-klein-base-9B"
# SD3's position table is in the checkpoint, although diffusers counts it among the buffers.
TRANSFORMERS = [
  (SD3, 2_028_328_000 + 192**2 * 1536),
  (SD35, 2_243_171_520 + 384**2 * 1536),
  (FLUX1, 11_901_408_320),
  (KLEIN_4B, 3_875_544_576),
  (KLEIN_9B, 9_078_581_248),
]
VAES = [(SD3, 83_819_683), (SD35, 83_819_683), (FLUX1, 83_819_683)]
VAES += [(KLEIN_4B, 84_046_371), (KLEIN_9B, 84_046_371)]
CLIP_L, CLIP_G, T5_XXL = 123_060_480, 694_659_840, 4_762_310_656
TEXT = [
  (SD3, "text_encoder", CLIP_L + 768**2),
  (SD3, "text_encoder_2", CLIP_G),
  (SD3, "text_encoder_3", T5_XXL),
  (SD35, "text_encoder", CLIP_L + 768**2),
  (SD35, "text_encoder_2", CLIP_G),
  (SD35, "text_encoder_3", T5_XXL),
  (FLUX1, "text_encoder", CLIP_L),
  (FLUX1, "text_encoder_2", T5_XXL),
]
# Without the output layer, which Qwen3-4B shares with the embedding and Qwen3-8B does not.
QWEN3 = [(KLEIN_4B, 4_022_468_096), (KLEIN_9B, 8_190_735_360 - 151936 * 4096)]

published = functools.cache(lambda name: abstract_pipeline(name, jnp.float32))


def diffusers_model(config):
  values = {k: v for k, v in config.items() if not k.startswith("_")}
  with torch.device("meta"):
    return getattr(diffusers, config["_class_name"])(**values)


def text_model(config):
  config_class, name = {
    None: (transformers.CLIPTextConfig, *config.get("architectures", ())),
    "t5": (transformers.T5Config, "T5EncoderModel"),
    "qwen3": (transformers.Qwen3Config, "Qwen3ForCausalLM"),
  }[config.get("model_type")]
  with torch.device("meta"):
    return getattr(transformers, name)(config_class(**config))


def shapes(model, prefix=""):
  return {prefix + key: tuple(value.shape) for key, value in model.state_dict().items()}


def assert_same(params, table, theirs, ignored=()):
  """Every tensor is part of one leaf with the shape it should have there; returns their number.

  Tensors that match `ignored` belong to no leaf, and no leaf lacks a tensor.
  """
  leaves = dict(jax.tree_util.tree_flatten_with_path(params)[0])
  leaves = {tuple(k.key for k in path): leaf.shape for path, leaf in leaves.items()}
  left = dict(theirs)
  for entry in table.entries(params):
    found = {left.pop(key) for key in entry.keys}
    assert len(found) == 1, entry
    shape = found.pop()
    if entry.path[-1] == "kernel":
      outputs, inputs, *window = shape
      shape = (*window, inputs, outputs)
    stack = (len(entry.keys),) if entry.stacked else ()
    assert leaves.pop(entry.path) == (*stack, *shape), entry
  assert not leaves
  unread = {key for key in theirs if any(re.fullmatch(pattern, key) for pattern in ignored)}
  assert left.keys() == unread
  return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name, count", TRANSFORMERS)
def test_transformer(name, count):
  model, ours = diffusers_model(PUBLISHED[name]["transformer"]), published(name)
  # The file holds every field, of which the table of published configs names some.
  complete = build_transformer(json.loads(model.to_json_string()))
  assert complete.config == ours.transformer.config
  assert assert_same(ours.params, ours.transformer.table, shapes(model)) == count


def test_flux1_without_guidance():
  config = PUBLISHED[FLUX1]["transformer"] | {"guidance_embeds": False}
  ours = build_transformer(config)
  theirs = shapes(diffusers_model(config))
  assert assert_same(ours.init_abstract(), ours.table, theirs) == 11_891_178_560


@pytest.mark.parametrize("name, count", VAES)
def test_autoencoder(name, count):
  model, ours = diffusers_model(PUBLISHED[name]["vae"]), published(name)
  complete = type(ours.vae.config).from_dict(json.loads(model.to_json_string()))
  assert complete == ours.vae.config
  flux2 = isinstance(ours.vae, vae_flux2.AutoencoderKLFlux2)
  ignored = vae_flux2.IGNORED_KEYS if flux2 else ()
  assert assert_same(ours.vae_params, ours.vae.table, shapes(model), ignored) == count


@pytest.mark.parametrize("name, part, count", TEXT)
def test_text_encoder(name, part, count):
  config, params = PUBLISHED[name][part], published(name).text.params[part]
  model = text_model(config)
  if config.get("model_type") == "t5":
    assert assert_same(params, t5.TABLE, shapes(model), t5.IGNORED_KEYS) == count
  elif config["architectures"] == ["CLIPTextModel"]:
    # transformers 5 drops the prefix that published files have.
    assert assert_same(params, clip.BARE_TEXT_TABLE, shapes(model)) == count
    assert assert_same(params, clip.TABLE, shapes(model, "text_model.")) == count
  else:
    assert assert_same(params, clip.TABLE, shapes(model)) == count


@pytest.mark.parametrize("name, count", QWEN3)
def test_qwen3(name, count):
  config = PUBLISHED[name]["text_encoder"]
  theirs = shapes(text_model(config))
  read = qwen3.Qwen3Config.from_dict(config)
  ignored = qwen3.ignored_keys(read, FLUX2_LAYERS)
  table = qwen3.key_table(FLUX2_LAYERS)
  assert_same(published(name).text.params, table, theirs, ignored)
  layers = (*FLUX2_LAYERS, read.num_hidden_layers)
  whole = qwen3.Qwen3(read, layers)
  params = jax.eval_shape(whole.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
  ignored = qwen3.ignored_keys(read, layers)
  assert ignored == (r"lm_head\.weight",)
  assert assert_same(params, qwen3.key_table(layers), theirs, ignored) == count
