"""Inputs and reference runs that the tests of both FLUX families share."""

import numpy as np


def randomised(cls, config, scale=0.05):
  """A diffusers model without zero gates or unit norms."""
  import torch

  torch.manual_seed(0)
  model = cls(**config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(scale * torch.randn_like(parameter))
  return model


def arrays(*shapes, seed=1):
  """Standard normal float32 arrays."""
  rng = np.random.default_rng(seed)
  return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def assert_same_weights(got, want):
  """Compares two models tensor by tensor, exactly."""
  import torch

  got, want = got.state_dict(), want.state_dict()
  assert got.keys() == want.keys()
  for key in want:
    assert torch.equal(got[key], want[key]), key
