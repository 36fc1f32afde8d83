"""Small CLIP models with random weights in the files that published ones come in."""

import json
from dataclasses import dataclass

import jax
import numpy as np
import torch
import transformers
from torch import nn

PROMPTS = [
  "a red cube",
  "two blue cubes left of a red one and more words than fit",
  "cube &amp; ball",
]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Sizes:
  """Encoders as (width, heads, layers); heads of 16 as in ViT-H/14, which 64 does not divide."""

  text: tuple[int, int, int] = (80, 5, 2)
  vision: tuple[int, int, int] = (80, 5, 2)
  patch: int = 8
  side: int = 24
  length: int = 16
  projection: int = 32


TINY = Sizes()
SIDE, LENGTH = TINY.side, TINY.length


def write_tokenizer(directory):
  letters = "abcdefghijklmnopqrstuvwxyz"
  pieces = ["!", "&", "&</w>", *letters, *(f"{c}</w>" for c in letters)]
  pieces += ["<|startoftext|>", "<|endoftext|>"]
  vocabulary = {piece: i for i, piece in enumerate(pieces)}
  tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[])
  tokenizer.save_pretrained(directory)
  return tokenizer, len(vocabulary)


def write_processor(directory, side=SIDE):
  settings = dict(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
  settings |= dict(image_mean=MEAN, image_std=STD, resample=3)
  (directory / "preprocessor_config.json").write_text(json.dumps(settings))


def randomise(model):
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return model.eval()


def clip_config(vocabulary, act="gelu", sizes=TINY):
  def tower(width, heads, layers):
    shape = dict(hidden_size=width, num_attention_heads=heads, num_hidden_layers=layers)
    return shape | dict(
      intermediate_size=4 * width, hidden_act=act, projection_dim=sizes.projection
    )

  text = tower(*sizes.text) | dict(vocab_size=vocabulary, max_position_embeddings=sizes.length)
  text |= dict(bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1)
  vision = tower(*sizes.vision) | dict(image_size=sizes.side, patch_size=sizes.patch)
  return transformers.CLIPConfig(
    text_config=text, vision_config=vision, projection_dim=sizes.projection
  )


def write_clip(directory, act="gelu", sizes=TINY):
  """A directory with all files; returns (model, tokenizer)."""
  tokenizer, vocabulary = write_tokenizer(directory)
  model = randomise(transformers.CLIPModel(clip_config(vocabulary, act, sizes)))
  with torch.no_grad():
    model.logit_scale.fill_(np.log(100.0))
  model.save_pretrained(directory)
  write_processor(directory, sizes.side)
  return model, tokenizer


class AestheticHead(nn.Module):
  """The published layers; the bias moves scores to where they usually are."""

  def __init__(self, width):
    super().__init__()
    torch.manual_seed(1)
    self.layers = nn.Sequential(
      nn.Linear(width, 1024), nn.Dropout(), nn.Linear(1024, 128), nn.Dropout(),
      nn.Linear(128, 64), nn.Dropout(), nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip
    with torch.no_grad():
      self.layers[7].bias.fill_(5.0)


def photos(count, height, width, seed=0):
  """Smooth uint8 images [count, height, width, 3] with some noise and full contrast."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:height, :width] / max(height, width)
  waves = rng.uniform(2, 9, (count, 3, 2, 1, 1))
  smooth = np.sin(waves[:, :, 0] * x + rng.uniform(0, 6, (count, 3, 1, 1))) * np.cos(
    waves[:, :, 1] * y
  )
  values = 127.5 + 140 * smooth.transpose(0, 2, 3, 1) + rng.normal(0, 8, (count, height, width, 3))
  return np.clip(values, 0, 255).round().astype(np.uint8)


def leaf(images):
  """uint8 [B, H, W, 3] as a torch leaf in [0, 1], [B, 3, H, W]."""
  return torch.tensor(images.transpose(0, 3, 1, 2) / np.float32(255), requires_grad=True)


def normalise(x):
  return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def resize_and_crop(x, mode, *, down=False):
  """torch's antialiased resize of the short side to SIDE and the middle square."""
  height, width = x.shape[2:]
  short = min(height, width)
  size = (SIDE * height // short, SIDE * width // short)
  x = torch.nn.functional.interpolate(x, size, mode=mode, antialias=True)
  top, left = ((n - SIDE) // 2 if down else round((n - SIDE) / 2) for n in size)
  return normalise(x[:, :, top : top + SIDE, left : left + SIDE])


def unit(x):
  return x / x.norm(dim=-1, keepdim=True)


def run(reward, images, name="score", prompts=PROMPTS):
  """Scores [B] of images [B, H, W, 3], bytes or in [0, 1], and the gradient of their sum."""
  if images.dtype == np.uint8:
    images = images / np.float32(255)

  def total(x, params, ids):
    scores = getattr(reward, name)(params, x, reward.text_features(params, ids))
    return scores.sum(), scores

  program = jax.jit(jax.value_and_grad(total, has_aux=True))
  (_, scores), gradient = program(images, reward.params, reward.tokenize(prompts))
  return scores, gradient


def assert_gradient(got, want):
  """Within a thousandth of the largest entry of the torch gradient [B, 3, H, W]."""
  want = want.numpy().transpose(0, 2, 3, 1)
  assert np.abs(want).max() > 0
  np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max(), rtol=0)
