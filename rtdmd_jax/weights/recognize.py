"""What a checkpoint of unexpected keys probably is."""

import re
from collections.abc import Iterable

# The first whose pattern is found in any key; adapters carry the keys of what they adapt.
_MARKS = (
  (r"\.lora_(A|B|down|up)\b", "a file of LoRA adapters; name it under load or loras"),
  (r"(^|\.)double_blocks\.\d", "a FLUX checkpoint of the first release; use diffusers' files"),
  (r"(^|\.)joint_blocks\.\d", "an SD3 checkpoint of the first release; use diffusers' files"),
  (r"^(double|single)_stream_modulation", "a FLUX.2 transformer"),
  (r"^single_transformer_blocks\.", "a FLUX.1 transformer"),
  (r"^pos_embed\.pos_embed$", "an SD3 transformer"),
  (r"^bn\.running_mean$", "a FLUX.2 autoencoder"),
  (r"^(decoder|encoder)\.conv_in\.", "an autoencoder"),
  (r"^vision_model\.", "a CLIP model"),
  (r"^text_model\.", "a CLIP text encoder"),
  (r"^encoder\.block\.0\.layer\.0\.SelfAttention", "a T5 encoder"),
  (r"^(model\.)?layers\.0\.self_attn\.", "a Qwen3 text encoder"),
  (r"(^|\.)input_blocks\.\d", "a U-Net, which is no transformer"),
)


def recognized(keys: Iterable[str]) -> str:
  """` (it looks like ...)` for the message about keys that do not fit; empty if unknown."""
  keys = list(keys)
  for pattern, words in _MARKS:
    if any(re.search(pattern, key) for key in keys):
      return f" (it looks like {words})"
  return ""
