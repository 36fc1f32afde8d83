"""Small FLUX pipelines of diffusers."""

import pytest
from tokenizers import pre_tokenizers

from rtdmd_jax.pretrain.tokenizers import train_clip_tokenizer, train_t5_tokenizer
from tests.parity import flux_reference

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

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
