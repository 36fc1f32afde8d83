"""Stage 0: trains a whole pipeline from scratch and writes it as a diffusers directory."""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rtdmd_jax.errors import UserError
from rtdmd_jax.models.encoders import load_clip_text, load_vae
from rtdmd_jax.models.tokenizer import load_tokenizer, tokenize
from rtdmd_jax.pretrain.autoencoder import train_autoencoder
from rtdmd_jax.pretrain.contrastive import train_scorer, train_text_towers
from rtdmd_jax.pretrain.data import draw_scenes
from rtdmd_jax.pretrain.teacher import Captioned, cache_latents, train_teacher
from rtdmd_jax.pretrain.tokenizers import train_clip_tokenizer, train_t5_tokenizer

PARTS = {
  "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
  "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
  "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
  "text_encoder_3": ("transformers", "T5EncoderModel"),
  "tokenizer": ("transformers", "CLIPTokenizer"),
  "tokenizer_2": ("transformers", "CLIPTokenizer"),
  "tokenizer_3": ("transformers", "T5TokenizerFast"),
  "transformer": ("diffusers", "SD3Transformer2DModel"),
  "vae": ("diffusers", "AutoencoderKL"),
  "image_encoder": (None, None),
  "feature_extractor": (None, None),
}
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
# What each phase writes.
OUTPUTS = {
  "vae": ("vae",),
  "text": ("text_encoder", "text_encoder_2"),
  "scorer": ("clip",),
  "teacher": ("transformer", "text_encoder_3"),
}


def run(config: Any, workdir: Path) -> Path:
  """Runs the phases whose output is missing; returns the pipeline's directory.

  Args:
    config: see `configs/tiny_pretrain.py`.
    workdir: gets `pipeline/`, and `checkpoints/` from which an interrupted phase goes on.
  """
  directory, saved = workdir / "pipeline", workdir / "checkpoints"
  directory.mkdir(parents=True, exist_ok=True)
  start = Path(config.start) if config.start else None
  if start is not None:
    _copy_untrained(start, directory, config.phases)
  scenes = draw_scenes(config.images, config.seed, config.washed_out)
  clip_ids, t5_ids, special = _tokenize(scenes.captions, directory, config.max_length)
  if "vae" in config.phases and not (directory / "vae").exists():
    before = start and start / "vae"
    train_autoencoder(config.vae, scenes, directory / "vae", config.seed, saved / "vae", before)
  captioned = (scenes, clip_ids[:-1], special, directory, config.seed)
  if "text" in config.phases and not (directory / "text_encoder_2").exists():
    train_text_towers(config.text, *captioned, saved / "text")
  if "scorer" in config.phases and not (directory / "clip/model.safetensors").exists():
    train_scorer(config.scorer, *captioned, saved / "scorer")
  if "teacher" in config.phases and not (directory / "text_encoder_3").exists():
    latents = cache_latents(*load_vae(directory / "vae"), scenes.images)
    vocab_size = len(load_tokenizer(directory / "tokenizer_3"))
    states = _clip_states(clip_ids, directory)
    captioned = Captioned(latents, scenes.caption, *states, t5_ids, vocab_size)
    train_teacher(config.teacher, captioned, directory, config.seed, saved / "teacher", start)
  _write_index(directory)
  return directory


def _copy_untrained(start: Path, directory: Path, phases: Sequence[str]) -> None:
  """Copies from the pipeline `start` the tokenizers and what none of `phases` writes."""
  others = [part for phase, parts in OUTPUTS.items() if phase not in phases for part in parts]
  if not (start / "tokenizer").is_dir():
    raise UserError(
      f"config.start is {start}, which holds no pipeline; train one first, or set it."
    )
  for part in (*TOKENIZERS, *others):
    if not (directory / part).exists():
      shutil.copytree(start / part, directory / part)


def _tokenize(captions: list[str], directory: Path, length: int):
  """CLIP ids, T5 ids (both end with the empty prompt) and special tokens, of tokenizers on disk.

  Missing ones are trained first. Those that exist stay: another training orders the vocabulary
  differently, and the networks that have learnt with them would read other words.
  """
  if not (directory / "tokenizer_3").exists():
    train_clip_tokenizer(captions, directory / "tokenizer", max_length=length)
    for copy in ("tokenizer_2", "clip"):
      shutil.copytree(directory / "tokenizer", directory / copy, dirs_exist_ok=True)
    train_t5_tokenizer(captions, directory / "tokenizer_3", max_length=length)
  ids = []
  for name in ("tokenizer", "tokenizer_3"):
    tokenizer = load_tokenizer(directory / name)
    texts = [*captions, ""]
    ids.append(tokenize(tokenizer, texts, length=length, vocabulary=len(tokenizer)))
  clip = load_tokenizer(directory / "tokenizer")
  special = {
    "vocab_size": len(clip),
    "bos_token_id": clip.bos_token_id,
    "eos_token_id": clip.eos_token_id,
    "pad_token_id": clip.pad_token_id,
    "max_position_embeddings": length,
  }
  return *ids, special


def _clip_states(ids: np.ndarray, directory: Path) -> tuple[np.ndarray, np.ndarray]:
  """Token states and pooled projections of both CLIP text towers, side by side."""
  states, pooled = [], []
  for name in ("text_encoder", "text_encoder_2"):
    tower, params = load_clip_text(directory / name)
    out = jax.jit(partial(tower.apply, hidden=True))({"params": params}, ids)
    states.append(np.asarray(out.hidden[-2]))
    pooled.append(np.asarray(out.projected))
  return np.concatenate(states, axis=-1), np.concatenate(pooled, axis=-1)


def _write_index(directory: Path) -> None:
  index = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.35.0", **PARTS}
  (directory / "model_index.json").write_text(json.dumps(index, indent=2))
  (directory / "scheduler").mkdir(exist_ok=True)
  scheduler = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
  }
  (directory / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler, indent=2))
