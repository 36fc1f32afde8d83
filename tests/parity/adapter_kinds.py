"""Writers of adapter files as other trainers write them, and what diffusers or PEFT makes of each.

A writer takes a family, an empty directory and pytest's `monkeypatch`, and returns the path to read
and the change of each weight, or the words of a refusal. The reference is diffusers' loader where
it reads the kind, PEFT's for its own files, else diffusers' converter of the first releases'
checkpoints, whose layers most trainers name.
"""

import copy
import json
from typing import Any, NamedTuple

import diffusers
import numpy as np
import peft
import torch
from safetensors.torch import save_file

from rtdmd_jax.adapters.comfyui import fused_modules
from rtdmd_jax.adapters.load import Lora, load_adapters
from rtdmd_jax.adapters.peft import adapter_layers
from rtdmd_jax.models import build_transformer
from tests.parity.backbones import BACKBONES
from tests.parity.first_release import FirstRelease

NAME = "pytorch_lora_weights.safetensors"
PIPELINES = {
  "sd35": (diffusers.StableDiffusion3Pipeline, ("text_encoder_3", "tokenizer_3")),
  "flux1": (diffusers.FluxPipeline, ()),
  "flux2": (diffusers.Flux2KleinPipeline, None),
}
CONVERTERS = {
  "sd35": "convert_sd3_transformer_checkpoint_to_diffusers",
  "flux1": "convert_flux_transformer_checkpoint_to_diffusers",
  "flux2": "convert_flux2_transformer_checkpoint_to_diffusers",
}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "to_add_out"]


class Family(NamedTuple):
  """A small random transformer, diffusers' and ours."""

  name: str
  model: Any
  transformer: Any


def small(name):
  model = BACKBONES[name].reference()
  return Family(name, model, build_transformer(json.loads(model.to_json_string())))


def ours(family, path, scale=1.0):
  """What adapters add to each weight [out, in], by module."""
  tree = load_adapters([Lora(path, scale)], family.transformer)
  layers = adapter_layers(tree, family.transformer.table)
  return {module: (a @ b).T for module, (a, b) in layers.items()}


def theirs(model):
  """The same of a PyTorch model with adapters of PEFT."""
  return {
    name.removeprefix("base_model.model."): module.get_delta_weight(module.active_adapters[0])
    .detach()
    .numpy()
    for name, module in model.named_modules()
    if isinstance(module, peft.tuners.lora.LoraLayer)
  }


def diffusers_model(family, path):
  """The model after diffusers' pipeline has loaded a file."""
  cls, more = PIPELINES[family.name]
  absent = ["scheduler", "vae", "text_encoder", "tokenizer"]
  if more is not None:
    absent += ["text_encoder_2", "tokenizer_2", *more]
  pipe = cls(transformer=copy.deepcopy(family.model), **dict.fromkeys(absent))
  pipe.load_lora_weights(str(path.parent), weight_name=path.name)
  return pipe.transformer


def by_diffusers(family, path):
  """What diffusers' pipeline makes of a file."""
  return theirs(diffusers_model(family, path))


def by_converter(family, changes, monkeypatch):
  """Where diffusers' converter puts changes of the first release's weights [out, in]."""
  from diffusers.loaders import single_file_utils

  config, split = family.transformer.config, torch.split
  # The converter of FLUX.1 takes 3072 for the width of any model.
  narrow = lambda x, sizes, dim: split(x, [n * config.width // 3072 for n in sizes], dim)  # noqa: E731
  with monkeypatch.context() as patch:
    patch.setattr(torch, "split", narrow)
    checkpoint = {
      f"{name}.weight": torch.zeros(sum(n for _, n in layer.parts), layer.inputs)
      for name, layer in fused_modules(family.transformer).items()
    }
    checkpoint |= {f"{name}.weight": torch.tensor(change) for name, change in changes.items()}
    found = getattr(single_file_utils, CONVERTERS[family.name])(FirstRelease(config, checkpoint))
  return {k.removesuffix(".weight"): v.numpy() for k, v in found.items() if v.ndim == 2}


def assert_same(got, want):
  got, want = ({k: v for k, v in of.items() if np.any(v)} for of in (got, want))
  assert got.keys() == want.keys() and want
  for name, change in want.items():
    error = np.linalg.norm(got[name] - change) / np.linalg.norm(change)
    assert error < 1e-5, (name, error)


def drawn(layers, rank=lambda i: 4, seed=0):
  """Random A and B [r, in], [out, r] of layers, given as (name, outputs, inputs)."""
  torch.manual_seed(seed)
  return {
    name: (torch.randn(rank(i), inputs), torch.randn(outputs, rank(i)))
    for i, (name, outputs, inputs) in enumerate(layers)
  }


def linears(family, chosen=lambda name: True):
  """diffusers' dense layers."""
  return [
    (name, module.out_features, module.in_features)
    for name, module in family.model.named_modules()
    if isinstance(module, torch.nn.Linear) and chosen(name)
  ]


def firsts(family, chosen=lambda name: True):
  """The first release's dense layers."""
  return [
    (name, sum(rows for _, rows in layer.parts), layer.inputs)
    for name, layer in fused_modules(family.transformer).items()
    if chosen(name)
  ]


def write(path, pairs, name="{}", suffixes=("lora_A", "lora_B"), alphas=None, metadata=None):
  """A file with keys by `name`, called with each layer; alphas by layer."""
  rename = name if callable(name) else name.format
  state = {}
  for layer, (down, up) in pairs.items():
    state[f"{rename(layer)}.{suffixes[0]}.weight"] = down
    state[f"{rename(layer)}.{suffixes[1]}.weight"] = up
    if alphas:
      state[f"{rename(layer)}.alpha"] = torch.tensor(alphas[layer])
  save_file({k: v.clone().contiguous() for k, v in state.items()}, path, metadata=metadata)
  return path


def changes(pairs, alphas):
  return {
    layer: (alphas[layer] / len(down) * up @ down).numpy() for layer, (down, up) in pairs.items()
  }


def each(pairs, values=(1.0, 3.0, 8.0)):
  """An alpha for each layer."""
  return {layer: values[i % len(values)] for i, layer in enumerate(pairs)}


def underscored(prefix):
  return lambda layer: prefix + layer.replace(".", "_")


DOWN_UP = ("lora_down", "lora_up")


def tuned(family, **options):
  """A copy with random PEFT adapters on attention."""
  config = peft.LoraConfig(
    r=4, lora_alpha=6, target_modules=ATTENTION, init_lora_weights=False, **options
  )
  torch.manual_seed(1)
  return peft.get_peft_model(copy.deepcopy(family.model), config)


PATTERNS = dict(
  use_rslora=True,
  rank_pattern={"to_k": 2, r"transformer_blocks\.1\.attn\.to_q": 3},
  alpha_pattern={"transformer_blocks.0.attn.to_k": 16, "to_out.0": 1},
)


def diffusers_with_notes(family, directory, _):
  from peft.utils import get_peft_model_state_dict

  model = tuned(family, **PATTERNS)
  PIPELINES[family.name][0].save_lora_weights(
    directory,
    transformer_lora_layers={
      key.removeprefix("base_model.model."): value
      for key, value in get_peft_model_state_dict(model).items()
    },
    transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
  )
  assert_same(theirs(model), by_diffusers(family, directory / NAME))
  return directory / NAME, theirs(model)


def peft_directory(family, directory, _):
  model = tuned(family, **PATTERNS)
  model.save_pretrained(directory)
  return directory, theirs(peft.PeftModel.from_pretrained(copy.deepcopy(family.model), directory))


def peft_bin(family, directory, _):
  model = tuned(family, alpha_pattern=PATTERNS["alpha_pattern"])
  model.save_pretrained(directory, safe_serialization=False)
  return directory / "adapter_model.bin", theirs(model)


def kohya(family, directory, monkeypatch):
  """sd-scripts: the first release's layers; diffusers reads those of FLUX, the fused ones too."""
  kept = lambda name: "_blocks" in name and "linear1" not in name and "adaLN" not in name  # noqa: E731
  pairs = drawn(firsts(family, kept if family.name == "flux1" else lambda n: "_blocks" in n))
  alphas = each(pairs)
  path = write(directory / "k.safetensors", pairs, underscored("lora_unet_"), DOWN_UP, alphas)
  if family.name == "sd35":
    return path, by_converter(family, changes(pairs, alphas), monkeypatch)
  return path, by_diffusers(family, path)


def musubi(family, directory, monkeypatch):
  """musubi-tuner: every layer of some blocks and of the ends, ranks that differ."""
  pairs = drawn(firsts(family, lambda name: "blocks.0" not in name), rank=lambda i: 1 + i % 4)
  alphas = each(pairs)
  path = write(directory / "m.safetensors", pairs, underscored("lora_unet_"), DOWN_UP, alphas)
  return path, by_converter(family, changes(pairs, alphas), monkeypatch)


def onetrainer(family, directory, _):
  """diffusers' layers with underscores. diffusers reads those of FLUX.1's attention."""
  pairs = drawn(linears(family, lambda name: "attn" in name or "_embedder" in name))
  alphas = each(pairs)
  path = write(
    directory / "o.safetensors", pairs, underscored("lora_transformer_"), DOWN_UP, alphas
  )
  if family.name == "flux1":
    return path, by_diffusers(family, path)
  folded = {k: (down, alphas[k] / len(down) * up) for k, (down, up) in pairs.items()}
  return path, by_diffusers(family, write(directory / "d.safetensors", folded, "transformer.{}"))


def xlabs(family, directory, _):
  """XLabs trains FLUX.1 alone."""
  if family.name == "flux1":
    sizes = {layer: (outputs, inputs) for layer, outputs, inputs in firsts(family)}
    width = family.transformer.config.width
    layers = []
    for block, first, own in (
      ("double_blocks", "img_attn.qkv", "qkv_lora1"),
      ("double_blocks", "txt_attn.proj", "proj_lora2"),
      ("double_blocks", "txt_attn.qkv", "qkv_lora2"),
      ("double_blocks", "img_attn.proj", "proj_lora1"),
      ("single_blocks", "linear1", "qkv_lora"),
      ("single_blocks", "linear2", "proj_lora"),
    ):
      for i in range(2):
        outputs, inputs = sizes[f"{block}.{i}.{first}"]
        outputs = 3 * width if first == "linear1" else outputs
        layers.append((f"{block}.{i}.processor.{own}", outputs, inputs))
  else:
    layers = [("double_blocks.0.processor.ip_lora1", 8, 8)]
  path = write(directory / "x.safetensors", drawn(layers), suffixes=("down", "up"))
  if family.name != "flux1":
    return path, "no dense layer double_blocks.0.processor.ip_lora1"
  return path, by_diffusers(family, path)


def fal(family, directory, monkeypatch):
  """fal: PEFT's prefix before the first release's layers."""
  pairs = drawn(firsts(family, lambda name: "adaLN" not in name))
  path = write(directory / "f.safetensors", pairs, "base_model.model.{}")
  if family.name == "flux2":
    return path, by_diffusers(family, path)
  ones = {name: len(down) for name, (down, _) in pairs.items()}
  return path, by_converter(family, changes(pairs, ones), monkeypatch)


def ai_toolkit(family, directory, _):
  """ai-toolkit: the first release's layers for FLUX.2, else diffusers'; FLUX.1 has alphas too."""
  if family.name == "flux2":
    pairs, name = drawn(firsts(family, lambda n: "adaLN" not in n)), "diffusion_model.{}"
  else:
    # diffusers takes a pattern without an anchor for a name's end, so ends of others are left out.
    pairs = drawn(linears(family, lambda n: n not in ("proj_out", "norm_out.linear")))
    name = "transformer.{}"
  alphas = each(pairs) if family.name == "flux1" else None
  path = write(directory / "a.safetensors", pairs, name, alphas=alphas)
  return path, by_diffusers(family, path)


def comfyui(family, directory, monkeypatch):
  """ComfyUI's prefix, down and up; diffusers reads such a file for FLUX.1."""
  kept = lambda name: "_blocks" in name and "linear1" not in name  # noqa: E731
  pairs = drawn(firsts(family, kept if family.name == "flux1" else lambda n: True))
  alphas = each(pairs)
  path = write(directory / "c.safetensors", pairs, "diffusion_model.{}", DOWN_UP, alphas)
  if family.name == "flux1":
    return path, by_diffusers(family, path)
  return path, by_converter(family, changes(pairs, alphas), monkeypatch)


KINDS = [
  diffusers_with_notes,
  peft_directory,
  peft_bin,
  kohya,
  musubi,
  onetrainer,
  xlabs,
  fal,
  ai_toolkit,
  comfyui,
]
