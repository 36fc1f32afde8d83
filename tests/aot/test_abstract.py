"""Shapes of published checkpoints against published sizes, and of a real one against its files."""

import jax
import jax.numpy as jnp
import pytest

from rtdmd_jax.aot.abstract import abstract_batch, abstract_pipeline, abstract_setup
from rtdmd_jax.aot.compile import compile_to_text
from rtdmd_jax.aot.hlo import traffic
from rtdmd_jax.config import load_config
from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards import device_rewards
from rtdmd_jax.runtime.chips import CHIPS, chip, roofline
from rtdmd_jax.training.setup import build
from rtdmd_jax.weights.int8 import STORAGES
from rtdmd_jax.weights.published import read
from tests.support.paths import CONFIGS


def _count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


# Billions of parameters of the transformer; gigabytes of the text encoders in bfloat16.
@pytest.mark.parametrize(
  "name, parameters, text",
  [
    ("stable-diffusion-3-medium-diffusers", 2.08, 11.2),
    ("stable-diffusion-3.5-medium", 2.47, 11.2),
    ("FLUX.1-dev", 11.90, 9.8),
    ("FLUX.2-klein-base-4B", 3.88, 6.2),
    ("FLUX.2-klein-base-9B", 9.08, 11.7),
  ],
)
def test_published_sizes(name, parameters, text):
  pipeline = abstract_pipeline(f"nowhere/{name}", jnp.bfloat16)
  assert round(_count(pipeline.params) / 1e9, 2) == parameters
  assert abs(2 * _count(pipeline.text.params) / 1e9 - text) < 0.1
  assert round(_count(pipeline.vae_params) / 1e6) == 84
  assert {leaf.dtype for leaf in jax.tree.leaves(pipeline.params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("storage", STORAGES)
def test_the_tiny_pipeline_has_the_shapes_of_its_files(storage):
  config = load_config(str(CONFIGS / "tiny_stage2.py"), [f"model.base_storage={storage}"])
  with config.unlocked():
    del config.rewards["geneval"]
  abstract, real = abstract_setup(config), build(config)

  def shapes(tree):
    return jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)

  for name in ("generator", "fake_score", "vae", "rewards"):
    assert shapes(getattr(abstract.frozen, name)) == shapes(getattr(real.frozen, name))
  (one,), (other,) = abstract.frozen.bases.values(), real.frozen.bases.values()
  assert shapes(one) == shapes(other)
  assert shapes(abstract.pipeline.text.params) == shapes(real.pipeline.text.params)
  assert shapes(abstract.unconditional) == shapes(real.unconditional)
  assert jnp.array_equal(abstract.roles.sigmas, real.roles.sigmas)
  batch = abstract_batch(config, abstract)
  encoded = real.cache(["a red circle"])
  assert batch.conditioning.tokens.shape[1:] == encoded["conditioning"].tokens.shape[1:]
  assert batch.reward_text["clipscore"].shape[1:] == encoded["reward_text"]["clipscore"].shape[1:]
  assert batch.sample_index.shape == (96,)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("family", ["sd3", "sd35", "flux1", "flux2", "flux2_9b"])
def test_every_published_config_has_an_abstract_setup(family, stage):
  config = load_config(str(CONFIGS / f"{family}_{stage}.py"))
  setup = abstract_setup(config)
  assert len(setup.frozen.bases) == (2 if family.startswith("flux2") else 1)
  assert bool(setup.frozen.generator) == (stage == "stage2")
  named = {*config.rewards, *config.eval.rewards}
  assert set(setup.frozen.rewards) == named.intersection(device_rewards.NAMES)


def test_an_unknown_checkpoint_is_one_sentence():
  with pytest.raises(UserError, match="no published checkpoint of that name"):
    read("checkpoints/some-model", "transformer")


def test_roofline_takes_the_slowest_part():
  v5e = CHIPS["TPU v5 lite"]
  got = roofline(v5e, flops=197e12, memory=819e9 / 2, network=0.0)
  assert (got["seconds"], got["mfu_bound"]) == (1.0, 1.0)
  got = roofline(v5e, flops=197e12 / 4, memory=0.0, network=2 * 200e9)
  assert (got["seconds"], got["mfu_bound"]) == (2.0, 0.125)
  with pytest.raises(UserError, match="no peak rates"):
    chip("TPU v99")


def test_text_that_jaxlib_cannot_read_is_the_compilers_own():
  class Unreadable:
    def as_text(self):
      raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

  class Lowered:
    def __init__(self, lowered):
      self.lowered = lowered

    def compile(self, options):
      self.lowered.compile(options)
      return Unreadable()

  lowered = Lowered(jax.jit(lambda x: (x @ x).sum()).lower(jnp.ones((64, 64))))
  _, text = compile_to_text(lowered)
  readable, expected = compile_to_text(lowered.lowered)
  assert traffic(text) == traffic(expected) == traffic(readable.as_text())
  assert traffic(text).memory > 64 * 64 * 4
