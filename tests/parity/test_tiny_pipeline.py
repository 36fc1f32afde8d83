"""The shipped pipeline and its LoRA in a real client: diffusers' StableDiffusion3Pipeline."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.adapters.lora import fold_scale
from rtdmd_jax.adapters.peft import load_peft, save_peft
from rtdmd_jax.aot.abstract import abstract_pipeline
from rtdmd_jax.pipeline import Pipeline, sampling
from rtdmd_jax.pipeline.text import SD3_T5_LENGTH
from tests.support.paths import TINY

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = [pytest.mark.parity, pytest.mark.slow]

PROMPTS = ["a photo of a red circle", "a photo of three crosses"]
# Float32 on both sides; what is left is the order of summation, through 4 or 50 steps.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def ours():
  return Pipeline.from_pretrained(TINY)


@pytest.fixture(scope="module")
def theirs():
  pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(TINY, torch_dtype=torch.float32)
  pipe.set_progress_bar_config(disable=True)
  return pipe


def test_conditioning_equals_diffusers(ours, theirs):
  with torch.no_grad():
    tokens, _, pooled, _ = theirs.encode_prompt(
      PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=12
    )
  conditioning = ours.encode(PROMPTS)
  np.testing.assert_allclose(conditioning.tokens, tokens.numpy(), atol=1e-4)
  np.testing.assert_allclose(conditioning.pooled, pooled.numpy(), atol=1e-4)


def test_without_t5_zeros_stand_for_it_as_in_diffusers(tmp_path):
  directory = shutil.copytree(TINY, tmp_path / "tiny")
  for part in ("text_encoder_3", "tokenizer_3"):
    shutil.rmtree(directory / part)
  index = json.loads((directory / "model_index.json").read_text())
  index |= dict.fromkeys(("text_encoder_3", "tokenizer_3"), [None, None])
  (directory / "model_index.json").write_text(json.dumps(index))
  absent = dict(text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32)
  theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(directory, **absent)
  ours = Pipeline.from_pretrained(directory)
  with torch.no_grad():
    tokens, _, pooled, _ = theirs.encode_prompt(
      PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=SD3_T5_LENGTH
    )
  conditioning = ours.encode(PROMPTS)
  np.testing.assert_allclose(conditioning.tokens, tokens.numpy(), atol=1e-4)
  np.testing.assert_allclose(conditioning.pooled, pooled.numpy(), atol=1e-4)
  # The abstract pipeline, which --check builds, agrees.
  abstract = abstract_pipeline(str(directory), jnp.float32)
  assert jax.tree.structure(abstract.text.params) == jax.tree.structure(ours.text.params)


def test_guided_euler_samples_equal_diffusers(ours, theirs):
  key = jax.random.key(3)
  images = ours.sample(PROMPTS, key, image_size=64, steps=8, guidance=4.0)
  # The sampler's own starting noise, handed to diffusers.
  start = sampling.sample_noise(jax.random.split(key)[0], jnp.arange(2), ours.latent_shape(64))
  latents = torch.tensor(np.asarray(start).transpose(0, 3, 1, 2))
  expected = theirs(
    PROMPTS,
    height=64,
    width=64,
    num_inference_steps=8,
    guidance_scale=4.0,
    latents=latents,
    max_sequence_length=12,
    output_type="np",
  ).images
  np.testing.assert_allclose(images, expected, atol=TOLERANCE)


def test_the_shipped_lora_loads_in_diffusers(ours, theirs, tmp_path):
  transformer = ours.transformer
  adapters, alpha = load_peft(
    TINY / "stage1/generator", transformer.init_abstract(), transformer.table
  )
  folded = fold_scale(adapters, alpha)
  rank = next(leaf.shape[-1] for leaf in jax.tree.leaves(adapters))
  targets = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
  targets += ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
  save_peft(tmp_path, adapters, transformer.table, rank=rank, alpha=alpha, targets=targets)
  theirs.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
  conditioning = ours.encode(PROMPTS)
  x = jax.random.normal(jax.random.key(1), (2, *ours.latent_shape(64)))
  sigma = jnp.array([0.9, 0.5])
  variables = {"params": ours.params, "lora": folded}
  v = transformer.apply(variables, x, sigma, conditioning.tokens, conditioning.pooled)
  with torch.no_grad():
    expected = theirs.transformer(
      hidden_states=torch.tensor(np.asarray(x).transpose(0, 3, 1, 2)),
      timestep=torch.tensor(1000.0 * np.asarray(sigma)),
      encoder_hidden_states=torch.tensor(np.asarray(conditioning.tokens)),
      pooled_projections=torch.tensor(np.asarray(conditioning.pooled)),
    ).sample.numpy()
  theirs.unload_lora_weights()
  np.testing.assert_allclose(v, expected.transpose(0, 2, 3, 1), atol=1e-4)
  plain = ours.velocity(ours.params, x, sigma, conditioning)
  assert float(jnp.abs(plain - v).max()) > 1e-2
