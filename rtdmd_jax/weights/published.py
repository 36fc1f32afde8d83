"""Config files of the published checkpoints, so that shapes are known without downloading any.

`PUBLISHED` maps a directory's name to its files, each the part of the published JSON that decides
shapes. A file is known by its folder, the few that lie beside another by their own name. Values are
those of the model cards' repositories on huggingface.co, and of `openai/clip-vit-large-patch14`,
`laion/CLIP-ViT-H-14-laion2B-s32B-b79K`, `zai-org/ImageReward` and `Qwen/Qwen3-4B`, `-8B`.
"""

import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from rtdmd_jax.errors import UserError
from rtdmd_jax.weights import hub
from rtdmd_jax.weights.directory import read_config
from rtdmd_jax.weights.source import Source

Files = dict[str, dict[str, Any]]

_PROCESSOR, _MED = "preprocessor_config.json", "med_config.json"
_CLIP_PROCESSOR = {
  "size": 224,
  "crop_size": 224,
  "image_mean": (0.48145466, 0.4578275, 0.40821073),
  "image_std": (0.26862954, 0.26130258, 0.27577711),
}

_CLIP_L_TEXT = {
  "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_hidden_layers": 12,
  "num_attention_heads": 12, "hidden_act": "quick_gelu",
}  # fmt: skip
_CLIP_G_TEXT = {
  "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280, "num_hidden_layers": 32,
  "num_attention_heads": 20, "hidden_act": "gelu",
}  # fmt: skip
_CLIP_L = {
  "model_type": "clip",
  "projection_dim": 768,
  "text_config": _CLIP_L_TEXT,
  "vision_config": {
    "hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 768,
    "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
  },
}  # fmt: skip
_CLIP_H = {
  "model_type": "clip",
  "projection_dim": 1024,
  "text_config": {
    "hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 1024,
    "num_hidden_layers": 24, "num_attention_heads": 16, "hidden_act": "gelu",
  },
  "vision_config": {
    "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1024,
    "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14, "hidden_act": "gelu",
  },
}  # fmt: skip
_T5_XXL = {
  "model_type": "t5", "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
  "num_heads": 64, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_VAE = {
  "_class_name": "AutoencoderKL",
  "block_out_channels": (128, 256, 512, 512),
  "down_block_types": ("DownEncoderBlock2D",) * 4,
  "up_block_types": ("UpDecoderBlock2D",) * 4,
  "layers_per_block": 2,
  "latent_channels": 16,
  "use_quant_conv": False,
  "use_post_quant_conv": False,
}


def _sd3(**transformer: Any) -> Files:
  return {
    "": {"_class_name": "StableDiffusion3Pipeline"},
    "transformer": {
      "_class_name": "SD3Transformer2DModel", "num_layers": 24, "num_attention_heads": 24,
      "caption_projection_dim": 1536, **transformer,
    },
    "vae": _VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "scheduler": {"shift": 3.0},
    "text_encoder": _CLIP_L_TEXT | {"architectures": ["CLIPTextModelWithProjection"]},
    "text_encoder_2": _CLIP_G_TEXT | {"architectures": ["CLIPTextModelWithProjection"]},
    "text_encoder_3": _T5_XXL,
    "tokenizer": {"model_max_length": 77},
    "tokenizer_2": {"model_max_length": 77},
    "tokenizer_3": {"model_max_length": 512},
  }  # fmt: skip


def _klein(double: int, single: int, heads: int, qwen3: Mapping[str, int]) -> Files:
  return {
    "": {"_class_name": "Flux2KleinPipeline"},
    "transformer": {
      "_class_name": "Flux2Transformer2DModel", "num_layers": double, "num_single_layers": single,
      "num_attention_heads": heads, "joint_attention_dim": 3 * qwen3["hidden_size"],
      "guidance_embeds": False,
    },
    "vae": {"_class_name": "AutoencoderKLFlux2"},
    "scheduler": {"shift": 3.0, "use_dynamic_shifting": True},
    "text_encoder": {
      "model_type": "qwen3", "vocab_size": 151936, "num_hidden_layers": 36,
      "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
      "attention_bias": False, "rope_theta": 1e6, **qwen3,
    },
    "tokenizer": {"model_max_length": 131072},
  }  # fmt: skip


_KLEIN_4B = _klein(5, 20, 24, {"hidden_size": 2560, "intermediate_size": 9728})
_KLEIN_9B = _klein(8, 24, 32, {"hidden_size": 4096, "intermediate_size": 12288})
_FLUX1: Files = {
  "": {"_class_name": "FluxPipeline"},
  "transformer": {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
  "vae": _VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
  "scheduler": {"shift": 3.0, "use_dynamic_shifting": True},
  "text_encoder": _CLIP_L_TEXT | {"architectures": ["CLIPTextModel"]},
  "text_encoder_2": _T5_XXL,
  "tokenizer": {"model_max_length": 77},
  "tokenizer_2": {"model_max_length": 512},
}
PUBLISHED: dict[str, Files] = {
  "stable-diffusion-3-medium-diffusers": _sd3(pos_embed_max_size=192),
  "stable-diffusion-3.5-medium": _sd3(
    pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))
  ),
  "FLUX.1-dev": _FLUX1,
  "FLUX.2-klein-4B": _KLEIN_4B,
  "FLUX.2-klein-base-4B": _KLEIN_4B,
  "FLUX.2-klein-9B": _KLEIN_9B,
  "FLUX.2-klein-base-9B": _KLEIN_9B,
  "clip-vit-large-patch14": {"": _CLIP_L, _PROCESSOR: _CLIP_PROCESSOR},
  "CLIP-ViT-H-14-laion2B-s32B-b79K": {"": _CLIP_H, _PROCESSOR: _CLIP_PROCESSOR},
  "PickScore_v1": {"": _CLIP_H, _PROCESSOR: _CLIP_PROCESSOR},
  "ImageReward": {_MED: {}},  # the defaults of `MedConfig`
}


def read(directory: str | Path, part: str = "", file: str = "config.json") -> dict[str, Any]:
  """A config file of a checkpoint on this machine, or what the table knows of a published one.

  Args:
    directory: of the checkpoint, or its repository; if it is not here, its last component is
      looked up, and nothing is downloaded.
    part: the folder inside, such as "transformer", or "" for the directory itself.
    file: the file's name.

  Raises:
    UserError: neither exists.
  """
  found = hub.find_file(directory, str(PurePath(part, file)))
  if found is not None:
    return read_config(found.parent, found.name)
  name = hub.base_name(directory)
  if name not in PUBLISHED:
    raise UserError(
      f"{directory} does not exist, and no published checkpoint of that name is known; known are"
      f" {', '.join(PUBLISHED)}."
    )
  known = PUBLISHED[name].get(file if file in (_PROCESSOR, _MED) else part)
  if known is None:
    raise UserError(f"{directory} does not exist, and of the published {name} no {file} is known.")
  return known


def _locate(name: str | os.PathLike, kind: str) -> Path:
  return hub.find(name, kind) or Path(name)


def _read(directory: str | os.PathLike, file: str) -> dict[str, Any]:
  path = PurePath(file)
  return read(directory, "" if len(path.parts) == 1 else str(path.parent), path.name)


# Models of this machine, and the published ones where they are missing; nothing is downloaded.
PUBLISHED_SOURCE = Source(_locate, _read)
