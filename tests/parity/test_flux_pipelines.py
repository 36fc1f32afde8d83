"""Whole FLUX pipelines against diffusers': text encoders, schedules, guidance, decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from rtdmd_jax.errors import UserError
from rtdmd_jax.pipeline import Pipeline, sampling
from rtdmd_jax.pipeline.text import flux2_limits
from rtdmd_jax.pretrain.tokenizers import train_clip_tokenizer, train_t5_tokenizer
from tests.parity import flux_reference

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.slow]

PROMPTS = ["a photo of a red circle", "three <b> crosses"]
LENGTH = 48
# Height and width of the images.
SIZE = (64, 48)
VAE = dict(
  block_out_channels=(4, 8, 8, 8),
  down_block_types=("DownEncoderBlock2D",) * 4,
  up_block_types=("UpDecoderBlock2D",) * 4,
  layers_per_block=1,
  latent_channels=4,
  norm_num_groups=4,
)
TRANSFORMER = dict(
  in_channels=16,
  num_layers=2,
  num_single_layers=2,
  attention_head_dim=16,
  num_attention_heads=2,
)
# FLUX.1-dev's and FLUX.2-klein's scheduler; FLUX.1-schnell has no dynamic shift.
DYNAMIC = dict(shift=3.0, use_dynamic_shifting=True)
# The form of Qwen3's template for one user turn.
CHAT_TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
  "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)


def small(cls, config):
  torch.manual_seed(0)
  return cls(config).eval()


def flux1(directory, *, guidance_embeds):
  tokens = train_clip_tokenizer(PROMPTS, directory / "tokenizer", max_length=LENGTH)
  pieces = train_t5_tokenizer(PROMPTS, directory / "tokenizer_2", max_length=LENGTH)
  clip = transformers.CLIPTextConfig(
    vocab_size=tokens,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=LENGTH,
    eos_token_id=tokens - 1,
  )
  t5 = transformers.T5Config(vocab_size=pieces, d_model=20, d_kv=8, d_ff=32, num_heads=2)
  return diffusers.FluxPipeline(
    scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
      **DYNAMIC if guidance_embeds else dict(shift=1.0)
    ),
    vae=flux_reference.randomised(
      diffusers.AutoencoderKL, VAE | dict(scaling_factor=0.4, shift_factor=0.1)
    ),
    text_encoder=small(transformers.CLIPTextModel, clip),
    tokenizer=transformers.CLIPTokenizer.from_pretrained(directory / "tokenizer"),
    text_encoder_2=small(transformers.T5EncoderModel, t5),
    tokenizer_2=transformers.T5Tokenizer.from_pretrained(directory / "tokenizer_2"),
    transformer=flux_reference.randomised(
      diffusers.FluxTransformer2DModel,
      TRANSFORMER
      | dict(joint_attention_dim=20, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6))
      | dict(guidance_embeds=guidance_embeds),
    ),
  )


def qwen_tokenizer(chat_template=CHAT_TEMPLATE, padding_side="right"):
  specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {token: i for i, token in enumerate([*alphabet, *specials])}
  tokenizer = transformers.Qwen2Tokenizer(
    vocab=vocabulary,
    merges=[],
    model_max_length=LENGTH,
    extra_special_tokens=specials,
    padding_side=padding_side,
  )
  tokenizer.chat_template = chat_template
  return tokenizer


def flux2():
  tokenizer = qwen_tokenizer()
  qwen = transformers.Qwen3Config(
    vocab_size=len(tokenizer),
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=29,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
  )
  vae = flux_reference.randomised(diffusers.AutoencoderKLFlux2, VAE)
  vae.bn.running_mean.copy_(torch.randn(16))
  vae.bn.running_var.copy_(0.2 + torch.rand(16))
  return diffusers.Flux2KleinPipeline(
    scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC),
    vae=vae,
    text_encoder=small(transformers.Qwen3ForCausalLM, qwen),
    tokenizer=tokenizer,
    transformer=flux_reference.randomised(
      diffusers.Flux2Transformer2DModel,
      TRANSFORMER
      | dict(joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False),
    ),
  )


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
