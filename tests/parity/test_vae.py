"""AutoencoderKL against diffusers in float32; 1e-4 leaves room for the order of summation only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.models.vae import AutoencoderKL, VAEConfig, decode_images, encode_images
from rtdmd_jax.weights.safetensors import load_params, read_config, save_params

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity
TOLERANCE = 1e-4


def _reference(**changes):
  from diffusers import AutoencoderKL as Torch

  torch.manual_seed(0)
  settings = dict(
    block_out_channels=(8, 16, 16),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=2,
    latent_channels=4,
    norm_num_groups=4,
    scaling_factor=1.5,
    shift_factor=0.06,
    use_quant_conv=False,
    use_post_quant_conv=False,
  )
  return Torch(**settings | changes).eval()


def _load(directory, reference):
  reference.save_pretrained(directory)
  vae = AutoencoderKL(VAEConfig.from_dict(read_config(directory)))
  shapes = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
  return vae, load_params(directory, shapes, vae.table)


@pytest.mark.parametrize(
  "changes", [{}, {"use_quant_conv": True, "use_post_quant_conv": True}, {"shift_factor": None}]
)
def test_encode_and_decode_equal_diffusers(tmp_path, changes):
  reference = _reference(**changes)
  vae, params = _load(tmp_path, reference)
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (2, 24, 16, 3)).astype(np.float32)
  z = rng.normal(size=(2, 6, 4, 4)).astype(np.float32)
  with torch.no_grad():
    posterior = reference.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist
    shift = reference.config.shift_factor or 0.0
    latents = torch.tensor(z.transpose(0, 3, 1, 2)) / reference.config.scaling_factor + shift
    decoded = reference.decode(latents).sample
  encode = jax.jit(lambda p, x: vae.apply({"params": p}, x, method="encode"))
  mean, log_variance = encode(params, images)
  expected = posterior.mean.numpy().transpose(0, 2, 3, 1)
  np.testing.assert_allclose(mean, expected, atol=TOLERANCE)
  expected = posterior.logvar.numpy().transpose(0, 2, 3, 1)
  np.testing.assert_allclose(log_variance, expected, atol=TOLERANCE)
  expected = (0.5 * decoded.numpy().transpose(0, 2, 3, 1) + 0.5).clip(0, 1)
  got = jax.jit(lambda p, z: decode_images(vae, p, z))(params, z)
  np.testing.assert_allclose(got, expected, atol=TOLERANCE)


def test_latents_are_the_scaled_mean_or_a_sample(tmp_path):
  reference = _reference()
  vae, params = _load(tmp_path, reference)
  rng = np.random.default_rng(1)
  images = rng.uniform(0, 1, (2, 16, 24, 3)).astype(np.float32)
  noise = rng.normal(size=(2, 4, 6, 4)).astype(np.float32)
  with torch.no_grad():
    posterior = reference.encode(2 * torch.tensor(images.transpose(0, 3, 1, 2)) - 1).latent_dist
  std, mean = (a.numpy().transpose(0, 2, 3, 1) for a in (posterior.std, posterior.mean))
  run = jax.jit(lambda p, x, noise: encode_images(vae, p, x, noise=noise))
  got = run(params, images, None)
  np.testing.assert_allclose(got, 1.5 * (mean - 0.06), atol=TOLERANCE)
  got = run(params, images, noise)
  np.testing.assert_allclose(got, 1.5 * (mean + std * noise - 0.06), atol=2 * TOLERANCE)


@pytest.mark.slow
def test_gradient_of_unclamped_images_equals_diffusers(tmp_path):
  reference = _reference()
  vae, params = _load(tmp_path, reference)
  z = np.random.default_rng(2).normal(size=(1, 4, 6, 4)).astype(np.float32)
  leaf = torch.tensor(z.transpose(0, 3, 1, 2), requires_grad=True)
  images = 0.5 * reference.decode(leaf / 1.5 + 0.06).sample + 0.5
  images.square().sum().backward()

  def energy(x):
    return jnp.square(decode_images(vae, params, x, clamp=False)).sum()

  gradient = jax.jit(jax.grad(energy))(z)
  expected = leaf.grad.numpy().transpose(0, 2, 3, 1)
  np.testing.assert_allclose(gradient, expected, atol=1e-3, rtol=1e-3)


def test_written_weights_load_in_diffusers(tmp_path):
  from diffusers import AutoencoderKL as Torch

  reference = _reference()
  vae, params = _load(tmp_path, reference)
  save_params(tmp_path / "diffusion_pytorch_model.safetensors", params, vae.table)
  again = Torch.from_pretrained(tmp_path)
  for name, value in reference.state_dict().items():
    torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
