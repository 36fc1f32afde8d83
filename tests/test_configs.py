"""The published hyper-parameters of each backbone (RTDMD's released configurations)."""

from pathlib import Path

import jax
import numpy as np
import pytest

from rtdmd_jax.config import load_config
from rtdmd_jax.errors import UserError
from rtdmd_jax.models import build_transformer, lora

CONFIGS = Path(__file__).parents[1] / "configs"
NETWORKS = {
  "sd35": {"_class_name": "SD3Transformer2DModel", "num_layers": 24, "qk_norm": "rms_norm",
           "num_attention_heads": 24, "caption_projection_dim": 1536,
           "dual_attention_layers": tuple(range(13))},
  "flux1": {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
  "flux2": {"_class_name": "Flux2Transformer2DModel", "num_layers": 5, "num_single_layers": 20,
            "num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False},
  "flux2_9b": {"_class_name": "Flux2Transformer2DModel", "num_layers": 8, "num_single_layers": 24,
               "num_attention_heads": 32, "joint_attention_dim": 12288, "guidance_embeds": False},
}  # fmt: skip


def _load(name):
  return load_config(str(CONFIGS / f"{name}.py"))


@pytest.mark.parametrize(
  "family, guidance, size, rates, images, saved",
  [
    ("sd3", 7.0, 1024, (3e-5, 3e-6, 3e-5), 32 * 16, 100),
    ("sd35", 4.5, 512, (3e-5, 3e-6, 3e-5), 48 * 24, 100),
    ("flux1", 3.5, 512, (3e-5, 3e-6, 1e-6), 64 * 24, 50),
    ("flux2", 4.0, 512, (1e-6, 3e-6, 1e-6), 64 * 24, 100),
    ("flux2_9b", 4.0, 512, (1e-6, 3e-6, 1e-6), 64 * 24, 50),
  ],
)
def test_published_values(family, guidance, size, rates, images, saved):
  one, two, infer = (_load(f"{family}_{kind}") for kind in ("stage1", "stage2", "infer"))
  assert one.generator.learning_rate == one.fake_score.learning_rate == rates[0]
  assert (two.generator.learning_rate, two.fake_score.learning_rate) == rates[1:]
  for config in (one, two):
    assert config.dmd.guidance_low == config.dmd.guidance_high == guidance
    assert config.model.image_size == size
    assert (config.lora.rank, config.lora.alpha, config.dmd.eta) == (32, 64.0, 0.9)
  assert (one.batch.prompts, one.train.fake_update_ratio, one.ema.decay) == (72, 10, 0.99)
  assert two.batch.prompts * two.batch.repeats == images
  assert two.train.save_every == saved
  assert (two.dmd.consistency.weight == 0) == (family in ("flux1", "flux2_9b"))
  assert set(two.rewards) == {"clipscore", "hpsv2", "pickscore", "geneval"}
  assert (infer.height, infer.steps, infer.guidance, infer.few_step) == (1024, 4, 1.0, True)


DRAWBENCH = {"pickscore", "aesthetic", "clipscore", "hpsv2", "imagereward"}
OWN = {"hpsv3", "geneval", "geneval2", "ocr"}


def _held_out(config):
  """The prompts on which a training config scores each reward."""
  return {
    name: options.get("held_out", config.data.held_out)
    for section in (config.rewards, config.eval.rewards)
    for name, options in section.items()
  }


@pytest.mark.parametrize("family", ["sd3", "sd35", "flux1", "flux2", "flux2_9b"])
def test_each_reward_is_evaluated_on_its_published_prompts(family):
  published = dict.fromkeys(DRAWBENCH, "prompts/drawbench") | {n: f"prompts/{n}" for n in OWN}
  assert _held_out(_load(f"{family}_stage2")) == published
  suite = _load(f"{family}_eval")
  assert {n: suite.prompts[r.prompts] for n, r in suite.rewards.items()} == published
  assert _held_out(_load(f"{family}_stage1")) == {}
  scored = load_config(str(CONFIGS / f"{family}_stage1.py:scored"))
  absent = set() if family in ("sd3", "sd35") else {"geneval", "geneval2"}
  assert not scored.rewards
  assert _held_out(scored) == {n: p for n, p in published.items() if n not in absent}
  with pytest.raises(UserError, match="takes the argument 'scored', or none, but not 'score'"):
    load_config(str(CONFIGS / f"{family}_stage1.py:score"))


@pytest.mark.parametrize("family", ["flux2", "flux2_9b"])
def test_klein_distils_the_base_into_the_distilled_model(family):
  model = _load(f"{family}_stage1").model
  assert "base" in model.pretrained and model.generator_init == model.pretrained.replace(
    "base-", ""
  )
  assert model.teacher_init == model.fake_score_init == ""


@pytest.mark.parametrize(
  "family, layers", [("sd35", 191), ("flux1", 266), ("flux2", 80), ("flux2_9b", 112)]
)
def test_adapters_sit_on_as_many_layers_as_published(family, layers):
  transformer = build_transformer(NETWORKS[family])
  params = jax.eval_shape(transformer.init, jax.random.key(0))
  entries = lora.target_entries(params, transformer.table, _load(f"{family}_stage2").lora.targets)
  assert sum(len(lora.module_names(entry)) for entry in entries) == layers
  assert np.all([len(entry.shape) == 2 for entry in entries])
