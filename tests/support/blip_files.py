"""ImageReward in torch: transformers' BLIP, renamed as the ImageReward package's file has it."""

import dataclasses
import json
import re
import string

import torch
import transformers
from torch import nn
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from rtdmd_jax.models.med import MedConfig
from tests.support import clip_files as files

RENAMES = [
  (r"embeddings\.class_embedding", "cls_token"),
  (r"embeddings\.position_embedding", "pos_embed"),
  (r"embeddings\.patch_embedding", "patch_embed.proj"),
  (r"encoder\.layers\.(\d+)\.layer_norm([12])", r"blocks.\1.norm\2"),
  (r"encoder\.layers\.(\d+)\.self_attn\.projection", r"blocks.\1.attn.proj"),
  (r"encoder\.layers\.(\d+)\.self_attn\.qkv", r"blocks.\1.attn.qkv"),
  (r"encoder\.layers", "blocks"),
  (r"post_layernorm", "norm"),
]


class Reference(nn.Module):
  """Vision and text model of BLIP, the head and the standardisation."""

  def __init__(self, vision, text):
    super().__init__()
    self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
    sizes = [text.hidden_size, 1024, 128, 64, 16, 1]
    linear = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    drop = nn.Identity
    self.mlp = nn.Sequential(
      linear[0], drop(), linear[1], drop(), linear[2], drop(), linear[3], linear[4]
    )

  def forward(self, ids, mask, pixels):
    image = self.vision(pixel_values=pixels).last_hidden_state
    states = self.text(
      input_ids=ids,
      attention_mask=mask,
      encoder_hidden_states=image,
      encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long),
    ).last_hidden_state
    return (self.mlp(states[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072

  def published(self):
    """The state dictionary under the names of the ImageReward package."""
    found = {}
    for key, value in self.vision.state_dict().items():
      for pattern, new in RENAMES:
        key = re.sub("^" + pattern, new, key)
      found[f"blip.visual_encoder.{key}"] = value
    found |= {f"blip.text_encoder.{k}": v for k, v in self.text.state_dict().items()}
    return found | {f"mlp.layers.{k}": v for k, v in self.mlp.state_dict().items()}


def blip_reference(vision, text):
  """For rtdmd_jax's two configs."""
  vision_config = transformers.BlipVisionConfig(
    hidden_size=vision.hidden_size,
    intermediate_size=4 * vision.hidden_size,
    num_hidden_layers=vision.num_hidden_layers,
    num_attention_heads=vision.num_attention_heads,
    image_size=vision.image_size,
    patch_size=vision.patch_size,
    layer_norm_eps=1e-6,
  )
  text_config = transformers.BlipTextConfig(
    vocab_size=text.vocab_size,
    hidden_size=text.hidden_size,
    encoder_hidden_size=vision.hidden_size,
    intermediate_size=text.intermediate_size,
    num_hidden_layers=text.num_hidden_layers,
    num_attention_heads=text.num_attention_heads,
    max_position_embeddings=text.max_position_embeddings,
    layer_norm_eps=text.layer_norm_eps,
    is_decoder=True,  # builds the cross-attention; the calls are not causal
  )
  return Reference(vision_config, text_config)


def write_imagereward(directory, vision, text=(64, 4, 2)):
  """Writes ImageReward.pt, med_config.json and vocab.txt; returns the torch model.

  `text` is (width, heads, layers). The file also holds what the published one does not need.
  """
  letters = string.ascii_lowercase + ","
  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "cube", "##s"]
  words = list(dict.fromkeys([*words, *letters, *(f"##{c}" for c in letters)]))
  (directory / "vocab.txt").write_text("\n".join(words) + "\n")
  width, heads, layers = text
  config = MedConfig(len(words) + 2, width, 4 * width, layers, heads, 40)
  settings = dataclasses.asdict(config)
  settings |= dict(hidden_act="gelu", add_cross_attention=True, encoder_width=768)
  (directory / "med_config.json").write_text(json.dumps(settings))
  model = files.randomise(blip_reference(vision, config))
  extra = {
    "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None],
    "blip.vision_proj.weight": torch.zeros(8, 48),
    "blip.text_proj.bias": torch.zeros(8),
  }
  torch.save(model.published() | extra, directory / "ImageReward.pt")
  return model
