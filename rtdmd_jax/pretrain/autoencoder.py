"""Trains the autoencoder of a pipeline from scratch."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.models.encoders import load_vae
from rtdmd_jax.models.vae import AutoencoderKL, VAEConfig
from rtdmd_jax.pretrain.data import Scenes
from rtdmd_jax.pretrain.loop import Training, train
from rtdmd_jax.weights.safetensors import read_config, save_model


def train_autoencoder(
  config: Any,
  scenes: Scenes,
  directory: Path,
  seed: int,
  checkpoints: Path,
  start: Path | None = None,
) -> None:
  """Absolute error plus a small KL term; writes a diffusers `vae/` directory.

  The latents' mean and deviation become the shift and scale of config.json.

  Args:
    config: `model` config fields and the training settings.
    scenes: images.
    directory: to write.
    seed: of initialisation and batches.
    checkpoints: directory of the training's checkpoints.
    start: a `vae/` directory whose decoder is trained further; its latents stay what they are.
  """
  if start is None:
    model = config.model.to_dict()
    vae = AutoencoderKL(VAEConfig.from_dict(model))
    blank = jnp.zeros((1, *scenes.images.shape[1:]))
    params, fixed = vae.init(jax.random.key(seed), blank)["params"], {}
  else:
    model = read_config(start)
    vae, params = load_vae(start)
    params, fixed = {"decoder": params["decoder"]}, {"encoder": params["encoder"]}

  def loss_fn(params, batch, key):
    params = params | fixed
    images = batch["images"].astype(jnp.float32) / 127.5 - 1.0
    mean, log_variance = vae.apply({"params": params}, images, method="encode")
    z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    decoded = vae.apply({"params": params}, z, method="decode")
    error = jnp.mean(jnp.abs(decoded - images))
    # The absolute error alone stalls at painting the background; the square sees the shapes.
    square = jnp.mean(jnp.square(decoded - images))
    kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance)
    return error + 4.0 * square + config.kl_weight * kl, {"l1": error, "mse": square, "kl": kl}

  def next_batch(rng):
    return {"images": scenes.images[rng.integers(len(scenes.images), size=config.batch_size)]}

  training = Training(
    "autoencoder", config.steps, config.learning_rate, 0.99, seed=seed, checkpoints=checkpoints
  )
  params = train(training, loss_fn, params, next_batch)
  params = params | fixed
  if start is None:
    mean, std = latent_statistics(vae, params, scenes.images[:2048])
    model |= {"shift_factor": mean, "scaling_factor": 1.0 / std}
  file = directory / "diffusion_pytorch_model.safetensors"
  save_model(file, model, params, vae.table, dtype=jnp.float16)


def latent_statistics(vae: AutoencoderKL, params: Any, images: np.ndarray) -> tuple[float, float]:
  """Mean and standard deviation of the latents of uint8 images [N, H, W, 3]."""
  encode = jax.jit(lambda x: vae.apply({"params": params}, x / 127.5 - 1.0, method="encode")[0])
  parts = np.array_split(images.astype(np.float32), -(-len(images) // 64))
  z = np.concatenate([np.asarray(encode(part)) for part in parts])
  return float(z.mean()), float(z.std())
