"""HPSv3 (Qwen2-VL-7B with a reward head) through its authors' package `hpsv3`."""

import importlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from rtdmd_jax.errors import UserError
from rtdmd_jax.weights.reward_files import local_option


class HPSv3:
  """HPSv3 as a reward: `scorer(images, prompts, metadata) -> [B]`, about -10..16.

  The score is the first of the model's two outputs, its mean.
  """

  def __init__(self, *, directory: str, device: str = "cuda", batch: int = 8):
    """Loads the model.

    Args:
      directory: holds `HPSv3.safetensors`, and `config.yaml` if not the package's own is meant;
        or its repository.
      device: torch's name of a device.
      batch: images at once.

    Raises:
      UserError: the package or the checkpoint is missing.
    """
    try:
      package = importlib.import_module("hpsv3")
    except ImportError as error:
      raise UserError(
        f"reward 'hpsv3' needs the package hpsv3 ({error}); install it where the reward is served,"
        " as docs/rewards.md says, and give that service's url"
      ) from error
    folder = Path(local_option("hpsv3", "directory", directory))
    checkpoint, config = folder / "HPSv3.safetensors", folder / "config.yaml"
    if not checkpoint.is_file():
      raise UserError(f"reward 'hpsv3': {checkpoint} does not exist; give MizzenAI/HPSv3")
    self._model = package.HPSv3RewardInferencer(
      config_path=str(config) if config.is_file() else None,
      checkpoint_path=str(checkpoint),
      device=device,
    )
    self._batch = batch

  def __call__(
    self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping] | None
  ) -> np.ndarray:
    """Scores uint8 images `[B, H, W, 3]`."""
    del metadata
    scores = []
    with tempfile.TemporaryDirectory() as folder:
      for start in range(0, len(images), self._batch):
        paths = []
        for i, image in enumerate(images[start : start + self._batch]):
          paths.append(str(Path(folder) / f"{i}.png"))
          Image.fromarray(image).save(paths[-1])
        # By keyword: the order of the two differs between the package's versions.
        texts = list(prompts[start : start + self._batch])
        rows = self._model.reward(image_paths=paths, prompts=texts)
        scores += [float(row[0]) for row in rows]
    return np.array(scores, np.float32)
