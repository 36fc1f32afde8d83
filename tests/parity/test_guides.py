"""What docs/guides.md says of diffusers, run as written."""

import numpy as np
import pytest
from guides import checkout, run
from PIL import Image

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = [pytest.mark.parity, pytest.mark.slow]


def test_diffusers_draws_with_the_lora(tmp_path):
  run("The LoRA in diffusers", checkout(tmp_path))
  image = np.asarray(Image.open(tmp_path / "circle.png"))
  assert image.shape == (64, 64, 3) and image.std() > 10
