"""Whole FLUX pipelines against diffusers': text encoders, schedules, guidance, decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.errors import UserError
from rtdmd_jax.pipeline import Pipeline, sampling
from rtdmd_jax.pipeline.text import flux2_limits

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from tests.parity.flux_pipelines import (  # noqa: E402  after torch is known to be there
  LENGTH,
  PROMPTS,
  SIZE,
  flux1,
  flux2,
  qwen_tokenizer,
)

pytestmark = [pytest.mark.parity, pytest.mark.slow]


def start_latents(ours, key):
  """The sampler's own starting noise, channel-first for diffusers."""
  shape = ours.latent_shape(SIZE)
  start = sampling.sample_noise(jax.random.split(key)[0], jnp.arange(len(PROMPTS)), shape)
  return torch.tensor(np.asarray(start).transpose(0, 3, 1, 2))


def run(pipe, latents, steps, guidance):
  pipe.set_progress_bar_config(disable=True)
  return pipe(
    prompt=PROMPTS,
    height=SIZE[0],
    width=SIZE[1],
    num_inference_steps=steps,
    guidance_scale=guidance,
    latents=latents,
    max_sequence_length=LENGTH,
    output_type="np",
  ).images


@pytest.mark.parametrize("guidance_embeds", [True, False], ids=["dev", "schnell"])
def test_flux1_samples_equal_diffusers(tmp_path, guidance_embeds):
  theirs = flux1(tmp_path / "tokenizers", guidance_embeds=guidance_embeds)
  theirs.save_pretrained(tmp_path / "flux1")
  ours = Pipeline.from_pretrained(tmp_path / "flux1")
  assert ours.latent_shape(SIZE) == (8, 6, 4)
  with torch.no_grad():
    tokens, pooled, _ = theirs.encode_prompt(PROMPTS, None, max_sequence_length=LENGTH)
  conditioning = ours.encode(PROMPTS)
  np.testing.assert_allclose(conditioning.tokens, tokens.numpy(), atol=1e-4)
  np.testing.assert_allclose(conditioning.pooled, pooled.numpy(), atol=1e-4)
  key = jax.random.key(3)
  latents = theirs._pack_latents(start_latents(ours, key), 2, 4, 8, 6)
  guidance = 3.5 if guidance_embeds else 1.0
  expected = run(theirs, latents, 4, guidance)
  images = ours.sample(PROMPTS, key, image_size=SIZE, steps=4, guidance=guidance)
  assert expected.std() > 0.01
  np.testing.assert_allclose(images, expected, atol=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_flux2_samples_equal_diffusers(tmp_path, guidance):
  theirs = flux2()
  theirs.save_pretrained(tmp_path)
  ours = Pipeline.from_pretrained(tmp_path)
  assert ours.latent_shape(SIZE) == (4, 3, 16)
  with torch.no_grad():
    tokens, _ = theirs.encode_prompt(PROMPTS, max_sequence_length=LENGTH)
  conditioning = ours.encode(PROMPTS)
  assert conditioning.pooled is None
  assert not ours.text.tokenize(PROMPTS)["mask"].all()
  np.testing.assert_allclose(conditioning.tokens, tokens.numpy(), atol=1e-4)
  key = jax.random.key(3)
  expected = run(theirs, start_latents(ours, key), 4, guidance)
  images = ours.sample(PROMPTS, key, image_size=SIZE, steps=4, guidance=guidance)
  assert expected.std() > 0.01
  np.testing.assert_allclose(images, expected, atol=1e-3)


@pytest.mark.parametrize("change", [{"chat_template": None}, {"padding_side": "left"}])
def test_a_tokenizer_that_would_encode_otherwise_is_refused(tmp_path, change):
  qwen_tokenizer(**change).save_pretrained(tmp_path / "tokenizer")
  with pytest.raises(UserError, match="chat template and padding_side"):
    flux2_limits(tmp_path)
