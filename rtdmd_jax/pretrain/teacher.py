"""Trains the flow-matching teacher of a pipeline, together with its T5 encoder."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.algo.losses import flow_matching_loss
from rtdmd_jax.algo.timesteps import logit_normal_sigma
from rtdmd_jax.algo.transitions import add_noise
from rtdmd_jax.models import Transformer, build_transformer, t5
from rtdmd_jax.models.encoders import load_t5
from rtdmd_jax.models.vae import AutoencoderKL, encode_images
from rtdmd_jax.pipeline.text import sd3_conditioning
from rtdmd_jax.pretrain.loop import LossFn, Training, muon, train
from rtdmd_jax.weights.safetensors import load_params, save_model


def cache_latents(vae: AutoencoderKL, params: Any, images: np.ndarray, chunk: int = 80):
  """Latents [N, h, w, C] float16 of uint8 images [N, H, W, 3], as the transformer sees them."""
  encode = jax.jit(lambda x: encode_images(vae, params, x.astype(jnp.float32) / 255.0))
  parts = np.array_split(images, -(-len(images) // chunk))
  return np.concatenate([np.asarray(encode(part), np.float16) for part in parts])


class Captioned(NamedTuple):
  """Latents and their captions, encoded as far as nothing of it is trained.

  Attributes:
    latents: [N, h, w, C].
    caption: [N] rows of the following arrays, whose last one is the empty prompt's.
    clip_states: [captions + 1, L, D] token states of the two CLIP towers.
    pooled: [captions + 1, P] their pooled states.
    ids: [captions + 1, L] T5 token ids.
    vocab_size: the T5 tokenizer's number of tokens.
  """

  latents: np.ndarray
  caption: np.ndarray
  clip_states: np.ndarray
  pooled: np.ndarray
  ids: np.ndarray
  vocab_size: int


def train_teacher(
  config: Any,
  data: Captioned,
  directory: Path,
  seed: int,
  checkpoints: Path,
  start: Path | None = None,
) -> None:
  """Flow matching with logit-normal sigmas and dropped captions; writes two directories.

  Args:
    config: `model` and `t5` config fields and the training settings.
    data: latents and captions.
    directory: the pipeline's; gets `transformer/` and `text_encoder_3/`.
    seed: of initialisation and batches.
    checkpoints: directory of the training's checkpoints.
    start: a pipeline whose networks are trained further.
  """
  model = config.model.to_dict()
  kind = {"architectures": ["T5EncoderModel"], "model_type": "t5", "is_encoder_decoder": False}
  t5_config = kind | config.t5.to_dict() | {"vocab_size": data.vocab_size}
  # On a CPU an update takes 0.7 of the time that unrolled blocks take, whose residual sums XLA
  # computes anew wherever it transposes an activation.
  transformer = build_transformer(model, remat="dots")
  encoder = t5.T5Encoder(t5.T5Config.from_dict(t5_config))
  keys = jax.random.split(jax.random.key(seed), 2)
  params = {
    "transformer": transformer.init(keys[0]),
    "t5": encoder.init(keys[1], jnp.array(data.ids[:1]))["params"],
  }
  if start is not None:
    shapes, table = transformer.init_abstract(), transformer.table
    params["transformer"] = load_params(start / "transformer", shapes, table, dtype=jnp.float32)
    params["t5"] = load_t5(start / "text_encoder_3")[1]
  loss_fn = _loss(config, transformer, encoder, data)

  def next_batch(rng):
    index = rng.integers(len(data.latents), size=config.batch_size)
    return {"latents": data.latents[index], "caption": data.caption[index]}

  training = Training(
    "teacher", config.steps, config.learning_rate, 0.999, seed, checkpoints, optimizer=muon
  )
  params = train(training, loss_fn, params, next_batch)
  save_model(
    directory / "transformer/diffusion_pytorch_model.safetensors",
    model,
    params["transformer"],
    transformer.table,
    dtype=jnp.float16,
  )
  file = directory / "text_encoder_3/model.safetensors"
  save_model(file, t5_config, params["t5"], t5.TABLE, dtype=jnp.float16)


def _loss(config: Any, transformer: Transformer, encoder: t5.T5Encoder, data: Captioned) -> LossFn:
  """The teacher's flow-matching loss; T5 is trained with it."""
  states, pooled, ids = (jnp.asarray(a) for a in (data.clip_states, data.pooled, data.ids))
  empty = len(data.ids) - 1

  def loss_fn(params, batch, key):
    sigma_key, noise_key, drop_key = jax.random.split(key, 3)
    x0 = batch["latents"].astype(jnp.float32)
    count = x0.shape[0]
    sigma = logit_normal_sigma(sigma_key, count, shift=config.shift)
    noise = jax.random.normal(noise_key, x0.shape)
    drop = jax.random.uniform(drop_key, (count,)) < config.caption_dropout
    caption = jnp.where(drop, empty, batch["caption"])
    t5_states = encoder.apply({"params": params["t5"]}, ids[caption])
    conditioning = sd3_conditioning(states[caption], pooled[caption], t5_states)
    v = transformer.velocity(
      params["transformer"],
      add_noise(x0, noise, sigma),
      sigma,
      conditioning.tokens,
      conditioning.pooled,
    )
    return flow_matching_loss(v, x0, noise), {}

  return loss_fn
