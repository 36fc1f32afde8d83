"""What is exported, in a real client: diffusers loads it and draws the same images."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import rtdmd_jax
from rtdmd_jax import cli, export
from rtdmd_jax.adapters.load import Lora, load_adapters
from rtdmd_jax.adapters.lora import build_adapters
from rtdmd_jax.adapters.peft import save_peft
from rtdmd_jax.pipeline import Pipeline, sampling
from tests.parity import test_sd3
from tests.parity.first_release import FirstRelease
from tests.parity.flux_pipelines import LENGTH, PROMPTS, SIZE, flux1, flux2

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = [pytest.mark.parity, pytest.mark.slow]

EIGHT = [f"attn.to_{n}" for n in ("q", "k", "v", "out.0", "add_out")]
EIGHT += [f"attn.add_{n}_proj" for n in "qkv"]
DUAL = [f"attn2.to_{n}" for n in ("q", "k", "v", "out.0")]
# Beyond the published targets, every kind of layer that is fused or swapped in the first release.
FAMILIES = {
  "sd3": (diffusers.StableDiffusion3Pipeline, [*EIGHT, "norm_out.linear", "ff.net.2"]),
  "sd35": (diffusers.StableDiffusion3Pipeline, [*EIGHT, *DUAL, "norm_out.linear", "ff.net.2"]),
  "flux1": (diffusers.FluxPipeline, [*EIGHT, "proj_mlp", "norm_out.linear"]),
  "flux2": (diffusers.Flux2KleinPipeline, [*EIGHT, "attn.to_qkv_mlp_proj", "norm_out.linear"]),
}
STEPS = 4
# Transformers of the shipped pipeline's interfaces.
SD3_SIZES = dict(
  sample_size=8,
  patch_size=1,
  attention_head_dim=8,
  caption_projection_dim=24,
  joint_attention_dim=128,
  pooled_projection_dim=128,
  pos_embed_max_size=8,
)


def sd3(directory, config):
  """The shipped pipeline with a random transformer of a published kind."""
  assets = f"{rtdmd_jax.__path__[0]}/assets/tiny"
  shutil.copytree(assets, directory, ignore=shutil.ignore_patterns("transformer", "stage1"))
  test_sd3.reference(config | SD3_SIZES).save_pretrained(directory / "transformer")


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
  """A pipeline directory, ours, an adapter directory with alpha / r = 2, and the images of both."""
  root = tmp_path_factory.mktemp(request.param)
  source = root / "pipeline"
  if request.param.startswith("sd3"):
    sd3(source, test_sd3.SD3 if request.param == "sd3" else test_sd3.SD35)
  else:
    made = flux1(root / "tokens", guidance_embeds=True) if request.param == "flux1" else flux2()
    made.save_pretrained(source)
  cls, targets = FAMILIES[request.param]
  ours = Pipeline.from_pretrained(source)
  transformer = ours.transformer
  abstract, key = transformer.init_abstract(), jax.random.key(5)
  adapters = build_adapters(abstract, transformer.table, targets, rank=3, key=key)
  adapters = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), adapters)
  lora = root / "lora"
  save_peft(lora, adapters, transformer.table, rank=3, alpha=6.0, targets=targets)
  folded = load_adapters([Lora(lora, 0.5)], transformer)
  plain, changed = (
    np.asarray(ours.sample(PROMPTS, jax.random.key(3), image_size=SIZE, steps=STEPS, adapters=a))
    for a in ({}, folded)
  )
  assert np.abs(plain - changed).max() > 0.02
  return request.param, cls, source, ours, lora, changed


def exported(case, out, kind, *more):
  _, _, source, _, lora, _ = case
  argv = ["export", f"--pipeline={source}", f"--lora={lora}:0.5", f"--format={kind}", *more]
  required = ("pipeline", "format", "out")
  code = cli.run(
    export.main, [*argv, f"--out={out}"], define_flags=export.define_flags, requires=required
  )
  assert code == 0
  return out


def images(case, pipe):
  """diffusers' own images from our starting noise."""
  name, _, _, ours, _, _ = case
  shape = ours.latent_shape(SIZE)
  start = sampling.sample_noise(jax.random.split(jax.random.key(3))[0], jnp.arange(2), shape)
  latents = torch.tensor(np.asarray(start).transpose(0, 3, 1, 2))
  if name == "flux1":
    latents = pipe._pack_latents(latents, 2, shape[2], *shape[:2])
  pipe.set_progress_bar_config(disable=True)
  return pipe(
    prompt=PROMPTS,
    height=SIZE[0],
    width=SIZE[1],
    num_inference_steps=STEPS,
    guidance_scale=1.0,
    latents=latents,
    max_sequence_length=12 if name.startswith("sd3") else LENGTH,
    output_type="np",
  ).images


def load(case, **kwargs):
  return case[1].from_pretrained(case[2], torch_dtype=torch.float32, **kwargs)


def test_diffusers_loads_the_exported_lora(case, tmp_path):
  out = exported(case, tmp_path / "out", "peft")
  pipe = load(case)
  pipe.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
  np.testing.assert_allclose(images(case, pipe), case[-1], atol=1e-3)


def test_diffusers_loads_the_merged_directory(case, tmp_path):
  out = exported(case, tmp_path / "out", "merged", "--dtype=float32")
  transformer = type(load(case).transformer).from_pretrained(out, torch_dtype=torch.float32)
  np.testing.assert_allclose(images(case, load(case, transformer=transformer)), case[-1], atol=1e-3)


def test_comfyui_names_are_those_of_the_first_release(case, tmp_path, monkeypatch):
  """diffusers' converter of the first releases' checkpoints maps our changes where they belong."""
  from diffusers.loaders import single_file_utils

  name, _, _, ours, lora, _ = case
  out = exported(case, tmp_path / "out", "comfyui")
  tensors = load_file(out / export.COMFYUI_NAME)
  assert all(key.startswith("diffusion_model.") for key in tensors)
  deltas = {}
  for key, a in tensors.items():
    if key.endswith(".lora_A.weight"):
      module = key.removeprefix("diffusion_model.").removesuffix(".lora_A.weight")
      b = tensors[key.replace("lora_A", "lora_B")]
      deltas[f"{module}.weight"] = torch.tensor(b @ a)
  convert = {
    "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "sd35": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "flux1": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "flux2": single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
  }[name]
  config, split = ours.transformer.config, torch.split
  # The converter of FLUX.1 takes 3072 for the width of any model.
  narrow = lambda x, sizes, dim: split(x, [n * config.width // 3072 for n in sizes], dim)  # noqa: E731
  monkeypatch.setattr(torch, "split", narrow)
  changes = convert(FirstRelease(config, deltas))
  expected = {}
  stored = load_file(lora / "adapter_model.safetensors")
  for key, a in stored.items():
    if ".lora_A." in key:
      module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
      # scale 0.5 times alpha / r = 2
      expected[f"{module}.weight"] = stored[key.replace("lora_A", "lora_B")] @ a
  for key, change in changes.items():
    want = expected.pop(key, np.zeros(()))
    np.testing.assert_allclose(change.numpy(), np.broadcast_to(want, change.shape), atol=1e-5)
  assert not expected


def test_comfyui_file_of_flux2_loads_in_diffusers(case, tmp_path):
  if case[0] != "flux2":
    pytest.skip("diffusers reads such names for FLUX.2 only")
  out = exported(case, tmp_path / "out", "comfyui")
  pipe = load(case)
  state = load_file(out / export.COMFYUI_NAME)
  # diffusers does not swap the halves of the last modulation of an adapter; leave that one out.
  state = {k: torch.tensor(v) for k, v in state.items() if "adaLN" not in k}
  pipe.load_lora_weights(state)
  flat = load_adapters([Lora(case[4], 0.5)], case[3].transformer)
  flat.pop("norm_out")
  ours = case[3].sample(PROMPTS, jax.random.key(3), image_size=SIZE, steps=STEPS, adapters=flat)
  np.testing.assert_allclose(images(case, pipe), ours, atol=1e-3)
