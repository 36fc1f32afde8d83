"""GenEval's detector: Mask2Former on COCO, and CLIP for the colours (arXiv 2310.11513).

The published scorer runs the same architecture in mmdet; here it runs in transformers, with weights
of another training run (facebook/mask2former-swin-small-coco-instance), so single detections may
differ.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from rtdmd_jax.datasets.geneval_records import CLASSES, COLORS
from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.backends.pytorch import pretrained, require_torch
from rtdmd_jax.rewards.host.geneval import SCORE_THRESHOLD, Detection
from rtdmd_jax.weights.reward_files import local_option

_TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
_GREY = 0x99
_SHORT_EDGE, _LONG_EDGE, _DIVISOR = 800, 1333, 32
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MOST = 100


class Mask2FormerDetector:
  """A detector for `GenEval`: uint8 images `[B, H, W, 3]` to lists of `Detection`."""

  def __init__(self, *, directory: str, clip: str, device: str = "cpu", batch: int = 4):
    """Loads both models.

    Args:
      directory: Mask2Former for COCO instances, in Hugging Face layout, or its repository.
      clip: CLIP (ViT-L/14 as published), in Hugging Face layout with its tokenizer, likewise.
      device: torch's name of a device.
      batch: images in the detector, and crops in CLIP, at once.

    Raises:
      UserError: torch is missing, or a folder is missing or holds something else.
    """
    self._torch = require_torch("geneval")
    from transformers import AutoTokenizer, CLIPModel, Mask2FormerForUniversalSegmentation

    self._device, self._batch = device, batch
    directory, clip = (
      local_option("geneval", key, name) for key, name in (("directory", directory), ("clip", clip))
    )
    model = pretrained("geneval", Mask2FormerForUniversalSegmentation, directory, device)
    if model.config.num_labels != len(CLASSES):
      raise UserError(
        f"reward 'geneval': {directory} has {model.config.num_labels} classes, not COCO's 80"
      )
    self._model = model
    self._clip = pretrained("geneval", CLIPModel, clip, device)
    self._tokenizer = AutoTokenizer.from_pretrained(clip, local_files_only=True)
    self._colors: dict[str, object] = {}

  def __call__(self, images: np.ndarray) -> list[list[Detection]]:
    """Objects above GenEval's threshold, with their colours."""
    detections = []
    with self._torch.inference_mode():
      for start in range(0, len(images), self._batch):
        detections += self._detect(images[start : start + self._batch])
    return detections

  def _detect(self, images: np.ndarray) -> list[list[Detection]]:
    torch = self._torch
    height, width = images.shape[1:3]
    inputs, size = resized(images)
    tensor = torch.from_numpy(inputs).permute(0, 3, 1, 2).to(self._device)
    mask = torch.zeros(tensor.shape[0], *tensor.shape[2:], dtype=torch.long, device=self._device)
    mask[:, : size[0], : size[1]] = 1
    output = self._model(pixel_values=tensor, pixel_mask=mask)
    result = []
    for i, image in enumerate(images):
      masks = torch.nn.functional.interpolate(
        output.masks_queries_logits[i][None], size=tensor.shape[2:], mode="bilinear"
      )[..., : size[0], : size[1]]
      masks = torch.nn.functional.interpolate(masks, size=(height, width), mode="bilinear")[0]
      probabilities = output.class_queries_logits[i].softmax(-1)[:, :-1]
      result.append(self._objects(image, probabilities, masks))
    return result

  def _objects(self, image: np.ndarray, probabilities, masks) -> list[Detection]:
    """Detections from class probabilities [Q, 80] and mask logits [Q, H, W] of one image."""
    best = probabilities.flatten().topk(min(_MOST, probabilities.numel()))
    boxes, crops, scores, names = [], [], [], []
    for score, index in zip(best.values, best.indices, strict=True):
      query, label = divmod(int(index), len(CLASSES))
      inside = masks[query] > 0
      if float(score) <= SCORE_THRESHOLD or not inside.any():
        continue  # the score of the mask, at most 1, only lowers that of the class
      score = float(score * masks[query][inside].sigmoid().mean())
      if score <= SCORE_THRESHOLD:
        continue
      inside = inside.cpu().numpy()
      boxes.append(box_of(inside))
      crops.append(cut_out(image, inside))
      scores.append(score)
      names.append(CLASSES[label])
    colors = self._color(crops, names)
    return [Detection(*values) for values in zip(names, boxes, scores, colors, strict=True)]

  def _color(self, crops: Sequence[np.ndarray], names: Sequence[str]) -> list[str]:
    colors = []
    for start in range(0, len(crops), self._batch):
      pixels = np.stack([clip_input(crop) for crop in crops[start : start + self._batch]])
      tensor = self._torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self._device)
      pooled = self._clip.vision_model(pixel_values=tensor).pooler_output
      features = _unit(self._clip.visual_projection(pooled))
      for feature, name in zip(features, names[start:], strict=False):
        colors.append(COLORS[int((self._color_features(name) @ feature).argmax())])
    return colors

  def _color_features(self, name: str):
    """Text features [10, D] of a class in every colour: the mean over the templates."""
    if name not in self._colors:
      texts = [template.format(c, name) for c in COLORS for template in _TEMPLATES]
      ids = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
      pooled = self._clip.text_model(**ids.to(self._device)).pooler_output
      features = _unit(self._clip.text_projection(pooled))
      self._colors[name] = _unit(features.reshape(len(COLORS), len(_TEMPLATES), -1).mean(1))
    return self._colors[name]


def _unit(features):
  return features / features.norm(dim=-1, keepdim=True)


def resized(images: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
  """The detector's input [B, h, w, 3] float32 and the size (h, w) of its part that is image.

  The short edge becomes 800 pixels, unless the long one would pass 1333; zeros fill up to multiples
  of 32.
  """
  height, width = images.shape[1:3]
  scale = min(_SHORT_EDGE / min(height, width), _LONG_EDGE / max(height, width))
  size = round(height * scale), round(width * scale)
  padded = [-(-edge // _DIVISOR) * _DIVISOR for edge in size]
  inputs = np.zeros((len(images), *padded, 3), np.float32)
  for i, image in enumerate(images):
    small = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    inputs[i, : size[0], : size[1]] = _normalized(small, _IMAGENET_MEAN, _IMAGENET_STD)
  return inputs, size


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
  """The box `(x0, y0, x1, y1)` around a mask [H, W] that is not empty; ends are exclusive."""
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def cut_out(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """The object on grey, cut to its box."""
  x0, y0, x1, y1 = (int(edge) for edge in box_of(mask))
  return np.where(mask[..., None], image, np.uint8(_GREY))[y0:y1, x0:x1]


def clip_input(crop: np.ndarray) -> np.ndarray:
  """CLIP's input [224, 224, 3]: short edge 224 (bicubic), the middle of the long one."""
  image = Image.fromarray(crop)
  scale = 224 / min(image.size)
  image = image.resize([max(round(edge * scale), 224) for edge in image.size], Image.BICUBIC)
  left, top = ((edge - 224) // 2 for edge in image.size)
  return _normalized(image.crop((left, top, left + 224, top + 224)), _CLIP_MEAN, _CLIP_STD)


def _normalized(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
  return (np.asarray(image, np.float32) / 255 - np.float32(mean)) / np.float32(std)
