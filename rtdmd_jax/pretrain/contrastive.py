"""Trains CLIP models: the text towers that condition the transformer, and the one that scores."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rtdmd_jax.models.clip import CLIP, TABLE, CLIPText
from rtdmd_jax.models.clip_config import CLIPConfig, TextConfig
from rtdmd_jax.pretrain.data import Scenes
from rtdmd_jax.pretrain.loop import Training, train
from rtdmd_jax.weights.safetensors import save_model

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def caption_loss(text: jax.Array, image: jax.Array, scale: jax.Array, caption: jax.Array):
  """Cross-entropy of unit vectors image [B, P] among those of all captions, text [C, P].

  The negatives of a batch are almost all easy; among all captions each image meets every one that
  differs from its own in a single word or in the order of two.

  Returns:
    the loss, and the share of images whose own caption [B] comes first.
  """
  logits = scale * image @ text.T
  losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, caption)
  return jnp.mean(losses), jnp.mean(jnp.argmax(logits, axis=1) == caption)


def train_text_towers(
  config: Any,
  scenes: Scenes,
  ids: np.ndarray,
  special: dict[str, int],
  directory: Path,
  seed: int,
  checkpoints: Path,
) -> None:
  """Writes `text_encoder/` and `text_encoder_2/`, trained against one image tower.

  Args:
    config: `text`, `text_2`, `vision` tower fields, `projection_dim`, and the training settings.
    scenes: captioned images.
    ids: [captions, L] token ids of `scenes.captions`.
    special: the tokenizer's fields of a text config (`vocab_size`, `eos_token_id`, ...).
    directory: of the pipeline.
    seed: of initialisation and batches.
    checkpoints: directory of the training's checkpoints.
  """
  both = _clip_config(config, special)
  text_2 = config.text_2.to_dict() | special | {"projection_dim": config.projection_dim}
  model = CLIP(CLIPConfig.from_dict(both), scan=False)
  second = CLIPText(TextConfig.from_dict(text_2), projection=True, scan=False)
  keys = jax.random.split(jax.random.key(seed), 2)
  params = {
    "clip": _init(model, keys[0], scenes, ids),
    "text_2": second.init(keys[1], jnp.array(ids[:1]))["params"],
  }

  def loss_fn(params, batch, key):
    text = _unit(model.apply({"params": params["clip"]}, ids, method=CLIP.text_features))
    other = _unit(second.apply({"params": params["text_2"]}, ids).projected)
    image, scale = _image_features(model, params["clip"], batch, key)
    loss, accuracy = caption_loss(text, image, scale, batch["caption"])
    image = jax.lax.stop_gradient(image)
    loss_2, accuracy_2 = caption_loss(other, image, scale, batch["caption"])
    return loss + loss_2, {"accuracy": accuracy, "accuracy_2": accuracy_2, "scale": scale}

  params = _train("text", loss_fn, params, scenes, config, seed, checkpoints)
  clip = params["clip"]
  first = {"text_model": clip["text_model"], "text_projection": clip["text_projection"]}
  for name, fields, tree in (
    ("text_encoder", both["text_config"], first),
    ("text_encoder_2", text_2, params["text_2"]),
  ):
    kind = {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model"}
    file = directory / name / "model.safetensors"
    save_model(file, kind | fields, tree, TABLE, dtype=jnp.float16)


def train_scorer(
  config: Any,
  scenes: Scenes,
  ids: np.ndarray,
  special: dict[str, int],
  directory: Path,
  seed: int,
  checkpoints: Path,
) -> None:
  """Writes `clip/`, a `CLIPModel` that tells scenes apart which differ in one word.

  Args:
    config: `text`, `vision` tower fields, `projection_dim`, and the training settings.
    scenes: captioned images.
    ids: [captions, L] token ids of `scenes.captions`.
    special: the tokenizer's fields of a text config (`vocab_size`, `eos_token_id`, ...).
    directory: of the pipeline.
    seed: of initialisation and batches.
    checkpoints: directory of the training's checkpoints.
  """
  both = _clip_config(config, special)
  model = CLIP(CLIPConfig.from_dict(both), scan=False)

  def loss_fn(params, batch, key):
    text = _unit(model.apply({"params": params}, ids, method=CLIP.text_features))
    image, scale = _image_features(model, params, batch, key)
    loss, accuracy = caption_loss(text, image, scale, batch["caption"])
    return loss, {"accuracy": accuracy, "scale": scale}

  params = _init(model, jax.random.key(seed), scenes, ids)
  params = _train("scorer", loss_fn, params, scenes, config, seed, checkpoints)
  kind = {"architectures": ["CLIPModel"], "model_type": "clip"}
  file = directory / "clip/model.safetensors"
  _write_preprocessor(directory / "clip", config.vision.image_size)
  save_model(file, kind | both, params, TABLE, dtype=jnp.float16)


def _clip_config(config: Any, special: dict[str, int]) -> dict[str, Any]:
  dim = {"projection_dim": config.projection_dim}
  text, vision = config.text.to_dict() | special | dim, config.vision.to_dict() | dim
  return {"text_config": text, "vision_config": vision} | dim


def _init(model: CLIP, key: jax.Array, scenes: Scenes, ids: np.ndarray) -> Any:
  pixels = jnp.zeros((1, *scenes.images.shape[1:]))
  return model.init(key, jnp.array(ids[:1]), pixels)["params"]


def _image_features(model: CLIP, params: Any, batch: dict[str, jax.Array], key: jax.Array):
  """Unit vectors of the batch's images, and the scale of the logits."""
  images = batch["images"].astype(jnp.float32) / 255.0
  # The reward must also rank images that are a little noisy.
  level_key, noise_key = jax.random.split(key)
  level = 0.06 * jax.random.uniform(level_key, (images.shape[0], 1, 1, 1))
  images = images + level * jax.random.normal(noise_key, images.shape)
  pixels = (images - jnp.array(IMAGE_MEAN)) / jnp.array(IMAGE_STD)
  features = model.apply({"params": params}, pixels, method=CLIP.image_features)
  return _unit(features), jnp.minimum(jnp.exp(params["logit_scale"]), 100.0)


def _train(name, loss_fn, params, scenes, config, seed, checkpoints):
  def next_batch(rng):
    index = rng.integers(len(scenes.images), size=config.batch_size)
    return {"images": scenes.images[index], "caption": scenes.caption[index]}

  training = Training(
    name, config.steps, config.learning_rate, 0.99, seed=seed, checkpoints=checkpoints
  )
  return train(training, loss_fn, params, next_batch)


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
