"""Adapters under the names of the models' first releases, which ComfyUI knows models by.

There q, k and v of an attention are one projection (in FLUX.1's single blocks together with the
feed-forward's input), and the last norms give the shift before the scale. An adapter file for
ComfyUI has keys `diffusion_model.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r];
without an `.alpha` key its strength is 1.
"""

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rtdmd_jax.adapters.keys import Fused
from rtdmd_jax.adapters.lora import dense_entries, module_names
from rtdmd_jax.adapters.peft import adapter_layers
from rtdmd_jax.models.flux1 import Flux1Config
from rtdmd_jax.models.flux2 import Flux2Config
from rtdmd_jax.models.sd3 import SD3Config
from rtdmd_jax.models.transformer import Transformer
from rtdmd_jax.runtime.files import save_tensors
from rtdmd_jax.weights.key_table import Entry

PREFIX = "diffusion_model."

# (diffusers' module, the first release's) as regular expressions. `#n` numbers the parts of a fused
# projection, `~` marks rows whose halves are swapped.
_EMBEDDERS = [
  (r"(.+\.)?timestep_embedder\.linear_1", "time_in.in_layer"),
  (r"(.+\.)?timestep_embedder\.linear_2", "time_in.out_layer"),
  (r"(.+\.)?text_embedder\.linear_1", "vector_in.in_layer"),
  (r"(.+\.)?text_embedder\.linear_2", "vector_in.out_layer"),
  (r"(.+\.)?guidance_embedder\.linear_1", "guidance_in.in_layer"),
  (r"(.+\.)?guidance_embedder\.linear_2", "guidance_in.out_layer"),
  (r"x_embedder", "img_in"),
  (r"context_embedder", "txt_in"),
  (r"proj_out", "final_layer.linear"),
  (r"norm_out\.linear", "final_layer.adaLN_modulation.1~"),
]
_DOUBLE, _SINGLE = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
_FLUX_ATTENTION = [
  *(
    (rf"{_DOUBLE}attn\.{part}", rf"double_blocks.\1.{stream}_attn.qkv#{i}")
    for i, c in enumerate("qkv")
    for part, stream in ((f"to_{c}", "img"), (f"add_{c}_proj", "txt"))
  ),
  (rf"{_DOUBLE}attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
  (rf"{_DOUBLE}attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
]
_FLUX1 = [
  *_FLUX_ATTENTION,
  (rf"{_DOUBLE}ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0"),
  (rf"{_DOUBLE}ff\.net\.2", r"double_blocks.\1.img_mlp.2"),
  (rf"{_DOUBLE}ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0"),
  (rf"{_DOUBLE}ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2"),
  (rf"{_DOUBLE}norm1\.linear", r"double_blocks.\1.img_mod.lin"),
  (rf"{_DOUBLE}norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
  *((rf"{_SINGLE}attn\.to_{c}", rf"single_blocks.\1.linear1#{i}") for i, c in enumerate("qkv")),
  (rf"{_SINGLE}proj_mlp", r"single_blocks.\1.linear1#3"),
  (rf"{_SINGLE}proj_out", r"single_blocks.\1.linear2"),
  (rf"{_SINGLE}norm\.linear", r"single_blocks.\1.modulation.lin"),
  *_EMBEDDERS,
]
_FLUX2 = [
  *_FLUX_ATTENTION,
  (rf"{_DOUBLE}ff\.linear_in", r"double_blocks.\1.img_mlp.0"),
  (rf"{_DOUBLE}ff\.linear_out", r"double_blocks.\1.img_mlp.2"),
  (rf"{_DOUBLE}ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0"),
  (rf"{_DOUBLE}ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2"),
  (rf"{_SINGLE}attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
  (rf"{_SINGLE}attn\.to_out", r"single_blocks.\1.linear2"),
  (r"(double_stream_modulation_(?:img|txt)|single_stream_modulation)\.linear", r"\1.lin"),
  *_EMBEDDERS,
]


def _sd3(config: SD3Config) -> list[tuple[str, str]]:
  last = rf"transformer_blocks\.({config.num_layers - 1})\."
  x, context = r"joint_blocks.\1.x_block.", r"joint_blocks.\1.context_block."
  return [
    *((rf"{_DOUBLE}(attn2?)\.to_{c}", rf"{x}\2.qkv#{i}") for i, c in enumerate("qkv")),
    *((rf"{_DOUBLE}attn\.add_{c}_proj", rf"{context}attn.qkv#{i}") for i, c in enumerate("qkv")),
    (rf"{_DOUBLE}(attn2?)\.to_out\.0", rf"{x}\2.proj"),
    (rf"{_DOUBLE}attn\.to_add_out", rf"{context}attn.proj"),
    (rf"{_DOUBLE}ff\.net\.0\.proj", rf"{x}mlp.fc1"),
    (rf"{_DOUBLE}ff\.net\.2", rf"{x}mlp.fc2"),
    (rf"{_DOUBLE}ff_context\.net\.0\.proj", rf"{context}mlp.fc1"),
    (rf"{_DOUBLE}ff_context\.net\.2", rf"{context}mlp.fc2"),
    (rf"{_DOUBLE}norm1\.linear", rf"{x}adaLN_modulation.1"),
    # The last block's text is only attended to: two modulations, scale and shift.
    (rf"{last}norm1_context\.linear", rf"{context}adaLN_modulation.1~"),
    (rf"{_DOUBLE}norm1_context\.linear", rf"{context}adaLN_modulation.1"),
    (r"time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
    (r"context_embedder", "context_embedder"),
    (r"proj_out", "final_layer.linear"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1~"),
  ]


_RULES = {SD3Config: _sd3, Flux1Config: lambda _: _FLUX1, Flux2Config: lambda _: _FLUX2}


def fused_modules(transformer: Transformer) -> dict[str, Fused]:
  """Every dense layer of the first release by its name there, without a prefix."""
  return fused_layers(
    transformer.config, dense_entries(transformer.init_abstract(), transformer.table)
  )


def fused_layers(config: Any, entries: Iterable[Entry]) -> dict[str, Fused]:
  """`native_layers` of a family's config and its transformer's dense layers."""
  rules = _RULES[type(config)](config)
  found: dict[str, list[tuple[int, str, int]]] = {}
  inputs, swapped = {}, set()
  for entry in entries:
    for module in module_names(entry):
      name, part = _rename(module, rules)
      if name.endswith("~"):
        name = name.removesuffix("~")
        swapped.add(name)
      outputs, inputs[name] = entry.shape
      found.setdefault(name, []).append((part, module, outputs))
  return {
    name: Fused(
      tuple((module, rows) for _, module, rows in sorted(parts)), inputs[name], name in swapped
    )
    for name, parts in found.items()
  }


def _rename(module: str, rules: Sequence[tuple[str, str]]) -> tuple[str, int]:
  for pattern, replacement in rules:
    if match := re.fullmatch(pattern, module):
      name, _, part = match.expand(replacement).partition("#")
      return name, int(part or 0)
  raise ValueError(f"{module} has no name in the first release")


def save_comfyui(
  path: str | os.PathLike, adapters: dict[str, Any], transformer: Transformer
) -> None:
  """Writes adapters as one file for ComfyUI, float32.

  A fused projection's adapter is block diagonal: its rank is the sum of its parts' ranks.

  Args:
    path: the safetensors file; it appears whole or not.
    adapters: adapter tree with the scale folded in.
    transformer: what they adapt.
  """
  layers = adapter_layers(adapters, transformer.table)
  tensors = {}
  for name, fused in fused_modules(transformer).items():
    adapted = [module for module, _ in fused.parts if module in layers]
    if not adapted:
      continue
    down = np.concatenate([layers[module][0].T for module in adapted])
    up = np.zeros((sum(rows for _, rows in fused.parts), len(down)), np.float32)
    row = column = 0
    for module, rows in fused.parts:
      if module in layers:
        part = layers[module][1].T
        up[row : row + rows, column : column + part.shape[1]] = part
        column += part.shape[1]
      row += rows
    if fused.swapped:
      up = np.roll(up, len(up) // 2, axis=0)
    tensors[f"{PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(down)
    tensors[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(up)
  save_tensors(path, tensors)
