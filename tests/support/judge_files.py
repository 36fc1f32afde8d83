"""The PyTorch models behind GenEval and GenEval2, small and random, in Hugging Face layout."""

import torch
import transformers

SPECIALS = [
  "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
  "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip


def _vocabulary(directory, specials, end=False):
  """A byte-level tokenizer without merges; with `end` the first special token ends texts."""
  from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens([AddedToken(s, special=True) for s in specials])
  if end:
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f"$A {specials[0]}", special_tokens=[(specials[0], len(alphabet))]
    )
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token=specials[0], eos_token=specials[0], model_max_length=77
  )
  fast.save_pretrained(directory)
  return fast


def write_clip(directory):
  tokenizer = _vocabulary(directory, ["<|endoftext|>"], end=True)
  small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
  config = transformers.CLIPConfig(
    text_config=small
    | dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, projection_dim=8),
    vision_config=small | dict(image_size=224, patch_size=56, projection_dim=8),
    projection_dim=8,
  )
  torch.manual_seed(0)
  transformers.CLIPModel(config).save_pretrained(directory)


def write_mask2former(directory, labels=80):
  backbone = transformers.SwinConfig(
    embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
    out_features=["stage1", "stage2", "stage3", "stage4"],
  )  # fmt: skip
  config = transformers.Mask2FormerConfig(
    backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
    encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
    num_attention_heads=2, num_queries=6, num_labels=labels,
  )  # fmt: skip
  torch.manual_seed(0)
  transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(directory)
  return str(directory)


def write_qwen3_vl(directory):
  tokenizer = _vocabulary(directory, SPECIALS)
  tokens = dict(zip(SPECIALS, tokenizer.convert_tokens_to_ids(SPECIALS), strict=True))
  config = transformers.Qwen3VLConfig(
    text_config=dict(
      vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
      num_attention_heads=2, num_key_value_heads=1, head_dim=16,
      rope_parameters={"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4},
    ),
    vision_config=dict(
      depth=2, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32, patch_size=4,
      spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=16,
      deepstack_visual_indexes=[0],
    ),
    image_token_id=tokens["<|image_pad|>"], video_token_id=tokens["<|video_pad|>"],
    vision_start_token_id=tokens["<|vision_start|>"],
    vision_end_token_id=tokens["<|vision_end|>"],
  )  # fmt: skip
  torch.manual_seed(0)
  model = transformers.Qwen3VLForConditionalGeneration(config)
  with torch.no_grad():
    model.lm_head.weight.mul_(20.0)
  model.save_pretrained(directory)
  from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

  size = {"shortest_edge": 256, "longest_edge": 4096}
  Qwen2VLImageProcessorPil(size=size, patch_size=4).save_pretrained(directory)
