"""The four kinds of backbone, small and random, as the tests of whole steps compare them."""

import copy
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from rtdmd_jax.config import load_config
from rtdmd_jax.models import build_transformer
from rtdmd_jax.weights.safetensors import load_params, read_config
from tests.parity import flux_reference, test_flux1, test_flux2, test_sd3
from tests.support.paths import CONFIGS


class Backbone(NamedTuple):
  """A small transformer and the published config whose targets and guidance it takes."""

  source: ModuleType
  sizes: dict[str, Any]
  published: str

  def reference(self):
    """The diffusers model with random weights, none of its gates zero."""
    return self.source.reference(self.sizes)

  def stage1(self):
    """The family's published config of the cold start."""
    return load_config(str(CONFIGS / f"{self.published}_stage1.py"))

  def run(self, model, latents, sigma, tokens, pooled, guidance):
    """Velocity [B, H, W, C] of a diffusers model, called as diffusers' pipeline calls it."""
    args = (latents, sigma, tokens, pooled, guidance)
    return self.source.run_reference(model, *(args[:4] if self.source is test_sd3 else args))


BACKBONES = {
  "sd3": Backbone(test_sd3, test_sd3.SD3, "sd3"),
  "sd35": Backbone(test_sd3, test_sd3.SD35, "sd35"),
  "flux1": Backbone(test_flux1, test_flux1.DEV, "flux1"),
  "flux2": Backbone(test_flux2, test_flux2.KLEIN, "flux2"),
}


def shapes(transformer, batch, length=7, sides=(3, 2)):
  """Shapes of latents, tokens and pooled embeddings (None if unused), sides in smallest steps."""
  latents, _, tokens, pooled, _ = transformer.example
  _, height, width, channels = latents.shape
  return (
    (batch, sides[0] * height, sides[1] * width, channels),
    (batch, length, tokens.shape[-1]),
    None if pooled is None else (batch, pooled.shape[-1]),
  )


def inputs(transformer, batch=2, seed=1):
  """Standard normal latents, tokens and pooled embeddings (None if unused), float32."""
  wanted = shapes(transformer, batch)
  drawn = iter(flux_reference.arrays(*filter(None, wanted), seed=seed))
  return [None if shape is None else next(drawn) for shape in wanted]


def loaded(model, directory, **options):
  """A diffusers model's Flax twin: (transformer, params); options are `build_transformer`'s."""
  model.save_pretrained(directory)
  transformer = build_transformer(read_config(directory), **options)
  dtype = options.get("dtype", np.float32)
  params = load_params(directory, transformer.init_abstract(), transformer.table, dtype=dtype)
  return transformer, params


def varied(model, scale=0.03, seed=9):
  """A copy with other weights."""
  import torch

  torch.manual_seed(seed)
  model = copy.deepcopy(model)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(scale * torch.randn_like(parameter))
  return model
