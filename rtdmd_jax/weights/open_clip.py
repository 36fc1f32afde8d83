"""open_clip's names for CLIP's tensors (`CLIP` of open_clip, also of HPSv2 and LAION)."""

import re
from collections.abc import Mapping

import numpy as np

_BLOCKS = {
  "visual.transformer.resblocks": "vision_model.encoder.layers",
  "transformer.resblocks": "text_model.encoder.layers",
}
_IN_BLOCK = {
  "ln_1": "layer_norm1",
  "ln_2": "layer_norm2",
  "attn.out_proj": "self_attn.out_proj",
  "mlp.c_fc": "mlp.fc1",
  "mlp.c_proj": "mlp.fc2",
}
_OUTSIDE = {
  "visual.class_embedding": "vision_model.embeddings.class_embedding",
  "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
  "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
  "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
  "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
  "visual.ln_post.weight": "vision_model.post_layernorm.weight",
  "visual.ln_post.bias": "vision_model.post_layernorm.bias",
  "positional_embedding": "text_model.embeddings.position_embedding.weight",
  "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
  "ln_final.weight": "text_model.final_layer_norm.weight",
  "ln_final.bias": "text_model.final_layer_norm.bias",
}
# Multiplied from the right there, so stored the other way round.
_TRANSPOSED = {
  "visual.proj": "visual_projection.weight",
  "text_projection": "text_projection.weight",
}
_BLOCK_KEY = re.compile(r"(?P<stack>.+resblocks)\.(?P<index>\d+)\.(?P<module>.+)\.(?P<leaf>\w+)")
# Queries, keys and values are one tensor, stacked in this order.
_FUSED_KEY = re.compile(
  r"(?P<stack>.+resblocks)\.(?P<index>\d+)\.attn\.in_proj_(?P<leaf>weight|bias)"
)
# The causal mask, a buffer that old versions stored.
_BUFFER = "attn_mask"


def to_transformers(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Renames open_clip's tensors to those of transformers' `CLIPModel`; nothing is copied.

  Args:
    tensors: by open_clip's key. Unknown keys keep their names, for a strict reader to report.
  """
  renamed: dict[str, np.ndarray] = {}
  for key, tensor in tensors.items():
    fused = _FUSED_KEY.fullmatch(key)
    if fused and fused["stack"] in _BLOCKS:
      attention = f"{_BLOCKS[fused['stack']]}.{fused['index']}.self_attn"
      for name, part in zip("qkv", np.split(tensor, 3), strict=True):
        renamed[f"{attention}.{name}_proj.{fused['leaf']}"] = part
    elif key in _TRANSPOSED:
      renamed[_TRANSPOSED[key]] = tensor.T
    elif key != _BUFFER:
      renamed[_OUTSIDE.get(key) or _block(key)] = tensor
  return renamed


def _block(key: str) -> str:
  """A key inside a transformer's block; any other stays."""
  match = _BLOCK_KEY.fullmatch(key)
  if match is None or match["stack"] not in _BLOCKS or match["module"] not in _IN_BLOCK:
    return key
  stack, module = _BLOCKS[match["stack"]], _IN_BLOCK[match["module"]]
  return f"{stack}.{match['index']}.{module}.{match['leaf']}"
