"""Guesses of what a checkpoint of unexpected keys is."""

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

# Tensors that lie beside quantised weights, by what writes them.
_QUANTISED = (
  (r"(^|\.)(scale_weight|scaled_fp8|comfy_quant)$", "scaled float8 weights of ComfyUI"),
  (r"\.(absmax|quant_map|nested_absmax|SCB|weight_format)$", "weights quantised by bitsandbytes"),
  (r"\.quant_state\.bitsandbytes", "weights quantised by bitsandbytes"),
  (r"[.:_]qdata$", "weights quantised by torchao"),
  (r"\.weight\._(data|scale)\b", "weights quantised by quanto"),
  (r"\.(qzeros|g_idx|qweight|wscales|scales)$", "weights quantised by GPTQ, AWQ or SVDQuant"),
  (r"\.(weight_packed|weight_scale|input_scale|weight_scale_inv)$", "scaled, quantised weights"),
)


def quantised(keys: Iterable[str]) -> tuple[str, str] | None:
  """The first key that only quantised weights have, and the words for what it belongs to."""
  for key in keys:
    for pattern, words in _QUANTISED:
      if re.search(pattern, key):
        return key, words
  return None


def recognized(keys: Iterable[str]) -> str:
  """` (it looks like ...)` for the message about keys that do not fit; empty if unknown."""
  keys = list(keys)
  for pattern, words in _MARKS:
    if any(re.search(pattern, key) for key in keys):
      return f" (it looks like {words})"
  return ""
