"""Preprocessing of the rewards against Pillow and torch."""

import jax
import numpy as np
import pytest

from rtdmd_jax.rewards.device.preprocess import (
  ClipTransform,
  StretchTransform,
  plain_cubic_matrix,
)

torch = pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")
from tests.support import clip_files as files  # noqa: E402  after torch is known to be there

pytestmark = pytest.mark.parity
ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
  ("shape", "edge"), [((512, 512), 224), ((300, 417), 224), ((90, 70), 128), ((1024, 1024), 224)]
)
@pytest.mark.parametrize("kind", ["photo", "noise"])
def test_pillow_rounding_is_pillows(shape, edge, kind):
  images = files.photos(1, *shape)
  if kind == "noise":  # overshoot is clipped after either pass
    images = np.random.default_rng(0).integers(0, 256, (1, *shape, 3)).astype(np.uint8)
  transform = ClipTransform(edge, edge, ZERO, ONE, "bicubic", rounding="pillow", margin="down")
  got = np.asarray(jax.jit(transform)(images / np.float32(255)))[0] * 255
  height, width = (edge * n // min(shape) for n in shape)
  want = np.asarray(Image.fromarray(images[0]).resize((width, height), Image.Resampling.BICUBIC))
  top, left = (height - edge) // 2, (width - edge) // 2
  want = want[top : top + edge, left : left + edge].astype(np.float32)
  np.testing.assert_allclose(got, want, atol=1e-4)  # 255 times a rounded 1 / 255


@pytest.mark.parametrize(("source", "target"), [((40, 40), 24), ((33, 52), 24), ((17, 24), 48)])
def test_stretch_equals_torch_without_antialiasing(source, target):
  leaf = files.leaf(files.photos(2, *source))
  want = torch.nn.functional.interpolate(
    leaf, (target, target), mode="bicubic", align_corners=False
  )
  want = files.normalise(want).detach().numpy().transpose(0, 2, 3, 1)
  images = leaf.detach().numpy().transpose(0, 2, 3, 1)
  got = StretchTransform(target, files.MEAN, files.STD)(images)
  np.testing.assert_allclose(got, want, atol=4e-5)


def test_plain_cubic_rows_sum_to_one():
  for source, target in ((512, 224), (5, 224), (1, 3)):
    np.testing.assert_allclose(plain_cubic_matrix(source, target).sum(1), 1, atol=1e-6)
