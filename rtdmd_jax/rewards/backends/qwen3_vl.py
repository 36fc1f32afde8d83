"""GenEval2's judge Qwen3-VL in PyTorch, where no inference server is at hand."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image

from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.backends.pytorch import pretrained, require_torch
from rtdmd_jax.rewards.host.geneval2 import Query, instruction
from rtdmd_jax.weights.reward_files import local_option

_IMAGE = "<|image_pad|>"
_CHAT = (
  "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)


class Qwen3VLAnswerer:
  """An answerer for `GenEval2`: softmax over the whole vocabulary, several questions at once."""

  def __init__(
    self, *, directory: str, device: str = "cuda", dtype: str = "float16", batch: int = 8
  ):
    """Loads the model.

    Args:
      directory: Qwen3-VL (8B-Instruct as published), in Hugging Face layout, or its repository.
      device: torch's name of a device.
      dtype: of the weights; float16 as RTDMD scores.
      batch: questions at once.

    Raises:
      UserError: torch is missing, or the folder is missing or holds something else.
    """
    self._torch = require_torch("geneval2")
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
      Qwen2VLImageProcessorPil,
    )

    kind = getattr(self._torch, dtype, None)
    if not isinstance(kind, self._torch.dtype):
      raise UserError(f"reward 'geneval2': {dtype!r} is no dtype of torch; use float16 or bfloat16")
    self._device, self._batch = device, batch
    directory = local_option("geneval2", "directory", directory)
    self._model = pretrained(
      "geneval2", Qwen3VLForConditionalGeneration, directory, device, dtype=kind
    )
    # Short questions are padded on the left, so that the answer's position is the last of all.
    self._tokenizer = AutoTokenizer.from_pretrained(
      directory, local_files_only=True, padding_side="left"
    )
    self._processor = Qwen2VLImageProcessorPil.from_pretrained(directory, local_files_only=True)

  def __call__(self, images: np.ndarray, queries: Sequence[Query]) -> list[list[float]]:
    """Probability of the first token of each query's variants."""
    rows = defaultdict(list)
    for i, query in enumerate(queries):
      rows[query.image].append(i)
    answers: list[list[float]] = [[] for _ in queries]
    for image, indices in rows.items():
      vision = self._processor(images=[Image.fromarray(images[image])], return_tensors="pt")
      for start in range(0, len(indices), self._batch):
        part = indices[start : start + self._batch]
        probabilities = self._probabilities(vision, [queries[i].question for i in part])
        for i, row in zip(part, probabilities, strict=True):
          answers[i] = [float(row[self._first_token(v)]) for v in queries[i].variants]
    return answers

  def _probabilities(self, vision, questions: Sequence[str]) -> np.ndarray:
    """Distribution [N, V] of the first token after each question about one image."""
    torch, count = self._torch, len(questions)
    grid = vision["image_grid_thw"]
    tokens = int(grid[0].prod()) // self._processor.merge_size**2
    texts = [_CHAT.format(image=_IMAGE * tokens, text=instruction(q)) for q in questions]
    inputs = self._tokenizer(texts, padding=True, return_tensors="pt").to(self._device)
    kinds = (inputs["input_ids"] == self._model.config.image_token_id).int()
    pixels = vision["pixel_values"].to(self._device, self._model.dtype)
    with torch.inference_mode():
      logits = self._model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        mm_token_type_ids=kinds,
        pixel_values=pixels.repeat(count, 1),
        image_grid_thw=grid.to(self._device).repeat(count, 1),
        logits_to_keep=1,
      ).logits
    return logits[:, -1].float().softmax(-1).cpu().numpy()

  def _first_token(self, text: str) -> int:
    return self._tokenizer(text, add_special_tokens=False)["input_ids"][0]
