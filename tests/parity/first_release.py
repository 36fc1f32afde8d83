"""FLUX.2's first release, as far as diffusers' converter reads it."""

import pytest

torch = pytest.importorskip("torch")


class FirstRelease(dict):
  """Changes of some weights in a checkpoint that has zeros for every other key asked for."""

  def __init__(self, config, deltas):
    super().__init__(deltas)
    self.config = config

  def __missing__(self, key):
    parts = 7 if "linear1" in key else 6 if "qkv" in key else 2
    rows = parts * self.config.width
    if key == "context_embedder.weight":
      rows = self.config.width
    return torch.zeros(rows) if key.endswith(("bias", "scale")) else torch.zeros(rows, 1)

  def pop(self, key, *default):
    return super().pop(key) if key in self else default[0] if default else self[key]
