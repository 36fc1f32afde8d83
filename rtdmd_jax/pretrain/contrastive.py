"""Trains the scoring CLIP and, in the same run, the text towers that condition the transformer."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.models.clip import CLIP, TABLE, CLIPText
from rtdmd_jax.models.clip_config import CLIPConfig, TextConfig
from rtdmd_jax.pretrain.data import Scenes
from rtdmd_jax.pretrain.loop import train
from rtdmd_jax.weights.safetensors import save_model

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def contrastive_loss(text: jax.Array, image: jax.Array, scale: jax.Array, same: jax.Array):
  """Symmetric cross-entropy of unit vectors [B, P]; equal captions (`same`) share the mass."""
  logits = scale * text @ image.T
  target = same / jnp.sum(same, axis=1, keepdims=True)
  rows = -jnp.sum(target * jax.nn.log_softmax(logits, axis=1), axis=1)
  columns = -jnp.sum(target * jax.nn.log_softmax(logits.T, axis=1), axis=1)
  accuracy = jnp.mean(same[jnp.arange(text.shape[0]), jnp.argmax(logits, axis=1)])
  return 0.5 * jnp.mean(rows + columns), accuracy


def train_contrastive(
  config: Any,
  scenes: Scenes,
  ids: np.ndarray,
  special: dict[str, int],
  directory: Path,
  seed: int,
  checkpoints: Path,
) -> None:
  """Writes `clip/` (a `CLIPModel`), `text_encoder/` and `text_encoder_2/`.

  Args:
    config: `text`, `text_2`, `vision` tower fields, `projection_dim`, and the training settings.
    scenes: captioned images.
    ids: [captions, L] token ids of `scenes.captions`.
    special: the tokenizer's fields of a text config (`vocab_size`, `eos_token_id`, ...).
    directory: of the pipeline.
    seed: of initialisation and batches.
    checkpoints: directory of the training's checkpoints.
  """
  text = config.text.to_dict() | special | {"projection_dim": config.projection_dim}
  text_2 = config.text_2.to_dict() | special | {"projection_dim": config.projection_dim}
  vision = config.vision.to_dict() | {"projection_dim": config.projection_dim}
  both = {
    "text_config": text,
    "vision_config": vision,
    "projection_dim": config.projection_dim,
  }
  model = CLIP(CLIPConfig.from_dict(both), scan=False)
  second = CLIPText(TextConfig.from_dict(text_2), projection=True, scan=False)
  keys = jax.random.split(jax.random.key(seed), 2)
  pixels = jnp.zeros((1, *scenes.images.shape[1:]))
  params = {
    "clip": model.init(keys[0], jnp.array(ids[:1]), pixels)["params"],
    "text_2": second.init(keys[1], jnp.array(ids[:1]))["params"],
  }
  mean, std = jnp.array(IMAGE_MEAN), jnp.array(IMAGE_STD)

  def loss_fn(params, batch, key):
    images = batch["images"].astype(jnp.float32) / 255.0
    # The reward must also rank images that are a little blurred or noisy.
    level_key, noise_key = jax.random.split(key)
    level = 0.06 * jax.random.uniform(level_key, (images.shape[0], 1, 1, 1))
    images = images + level * jax.random.normal(noise_key, images.shape)
    pixels = (images - mean) / std
    text, image, scale = model.apply({"params": params["clip"]}, batch["ids"], pixels)
    text, image, scale = _unit(text), _unit(image), jnp.minimum(jnp.exp(scale), 100.0)
    other = _unit(second.apply({"params": params["text_2"]}, batch["ids"]).projected)
    same = (batch["caption"][:, None] == batch["caption"][None, :]).astype(jnp.float32)
    loss, accuracy = contrastive_loss(text, image, scale, same)
    loss_2, accuracy_2 = contrastive_loss(other, jax.lax.stop_gradient(image), scale, same)
    return loss + loss_2, {"accuracy": accuracy, "accuracy_2": accuracy_2, "scale": scale}

  def next_batch(rng):
    index = rng.integers(len(scenes.images), size=config.batch_size)
    caption = scenes.caption[index]
    return {"images": scenes.images[index], "caption": caption, "ids": ids[caption]}

  params = train(
    "clip",
    loss_fn,
    params,
    next_batch,
    steps=config.steps,
    learning_rate=config.learning_rate,
    ema_decay=0.99,
    seed=seed,
    checkpoints=checkpoints,
  )
  clip = params["clip"]
  first = {"text_model": clip["text_model"], "text_projection": clip["text_projection"]}
  both = {"architectures": ["CLIPModel"], "model_type": "clip"} | both
  save_model(directory / "clip/model.safetensors", both, clip, TABLE, dtype=jnp.float16)
  _write_preprocessor(directory / "clip", config.vision.image_size)
  for name, fields, tree in (
    ("text_encoder", text, first),
    ("text_encoder_2", text_2, params["text_2"]),
  ):
    kind = {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model"}
    file = directory / name / "model.safetensors"
    save_model(file, kind | fields, tree, TABLE, dtype=jnp.float16)


def _unit(x: jax.Array) -> jax.Array:
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _write_preprocessor(directory: Path, size: int) -> None:
  settings = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": size},
    "crop_size": {"height": size, "width": size},
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
    "resample": 3,
  }
  (directory / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))
