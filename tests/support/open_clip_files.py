"""A torch CLIP with open_clip's published structure and names, and the files of HPSv2."""

from collections import OrderedDict

import torch
from torch import nn

from tests.support import clip_files as files


class Block(nn.Module):
  def __init__(self, width, heads):
    super().__init__()
    self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
    self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
    hidden = 4 * width
    layers = [("c_fc", nn.Linear(width, hidden)), ("gelu", nn.GELU())]
    self.mlp = nn.Sequential(OrderedDict([*layers, ("c_proj", nn.Linear(hidden, width))]))

  def forward(self, x, mask):
    y = self.ln_1(x)
    x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
    return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
  def __init__(self, width, heads, layers):
    super().__init__()
    self.resblocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])

  def forward(self, x, mask=None):
    for block in self.resblocks:
      x = block(x, mask)
    return x


class Visual(nn.Module):
  def __init__(self, width, heads, layers, patch, side, out):
    super().__init__()
    self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
    self.class_embedding = nn.Parameter(torch.randn(width))
    self.positional_embedding = nn.Parameter(torch.randn(1 + (side // patch) ** 2, width))
    self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
    self.transformer = Transformer(width, heads, layers)
    self.proj = nn.Parameter(torch.randn(width, out))

  def forward(self, x):
    x = self.conv1(x).flatten(2).transpose(1, 2)
    start = self.class_embedding.expand(len(x), 1, -1)
    x = torch.cat([start, x], 1) + self.positional_embedding
    return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
  def __init__(self, vocabulary, sizes):
    super().__init__()
    width, out = sizes.text[0], sizes.projection
    self.visual = Visual(*sizes.vision, sizes.patch, sizes.side, out)
    self.transformer = Transformer(*sizes.text)
    self.token_embedding = nn.Embedding(vocabulary, width)
    self.positional_embedding = nn.Parameter(torch.randn(sizes.length, width))
    self.ln_final = nn.LayerNorm(width)
    self.text_projection = nn.Parameter(torch.randn(width, out))
    self.logit_scale = nn.Parameter(torch.tensor(4.0))

  def encode_text(self, ids):
    length = ids.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)
    x = self.token_embedding(ids) + self.positional_embedding
    x = self.ln_final(self.transformer(x, mask))
    return x[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection


def write_open_clip(directory, sizes=files.TINY):
  """Writes hps.pt, the config and the tokenizer; returns (model, tokenizer)."""
  tokenizer, vocabulary = files.write_tokenizer(directory)
  files.clip_config(vocabulary, sizes=sizes).save_pretrained(directory)
  model = files.randomise(OpenClip(vocabulary, sizes))
  torch.save({"epoch": 3, "state_dict": model.state_dict()}, directory / "hps.pt")
  return model, tokenizer
