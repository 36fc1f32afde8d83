"""Adapters in diffusers' and PEFT's own hands."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax import export
from rtdmd_jax.adapters import lora
from rtdmd_jax.adapters.peft import adapter_layers, load_peft, save_peft
from rtdmd_jax.errors import UserError
from rtdmd_jax.models import build_transformer
from rtdmd_jax.models.load import load_transformer
from rtdmd_jax.weights.safetensors import read_config
from tests.parity.backbones import BACKBONES

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

CONFIG = dict(
  sample_size=16,
  patch_size=2,
  in_channels=4,
  num_layers=3,
  attention_head_dim=8,
  num_attention_heads=3,
  joint_attention_dim=20,
  caption_projection_dim=24,
  pooled_projection_dim=12,
  out_channels=4,
  pos_embed_max_size=12,
  dual_attention_layers=(0,),
  qk_norm="rms_norm",
)
TARGETS = [
  *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")),
  *(f"attn.add_{name}_proj" for name in "qkv"),
]
RANK, ALPHA = 4, 10.0


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  """A base checkpoint, its Flax twin and adapters with a non-zero b."""
  base = tmp_path_factory.mktemp("base")
  torch.manual_seed(0)
  model = diffusers.SD3Transformer2DModel(**CONFIG)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  model.save_pretrained(base)
  transformer = build_transformer(read_config(base))
  abstract = transformer.init_abstract()
  key = jax.random.key(1)
  adapters = lora.build_adapters(abstract, transformer.table, TARGETS, rank=RANK, key=key)
  adapters = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(key, x.shape), adapters)
  saved = tmp_path_factory.mktemp("lora")
  save_peft(saved, adapters, transformer.table, rank=RANK, alpha=ALPHA, targets=TARGETS)
  return base, transformer, abstract, adapters, saved


def inputs():
  rng = np.random.default_rng(1)
  shapes = [(2, 8, 8, 4), (2, 5, 20), (2, 12)]
  latents, tokens, pooled = (rng.standard_normal(s).astype(np.float32) for s in shapes)
  return latents, np.float32([0.9, 0.25]), tokens, pooled


def torch_velocity(model):
  latents, sigma, tokens, pooled = (torch.as_tensor(x) for x in inputs())
  with torch.no_grad():
    out = model.eval()(
      hidden_states=latents.permute(0, 3, 1, 2),
      timestep=1000 * sigma,
      encoder_hidden_states=tokens,
      pooled_projections=pooled,
      return_dict=False,
    )[0]
  return out.permute(0, 2, 3, 1).numpy()


@pytest.mark.slow
def test_diffusers_and_peft_load_what_is_written(case):
  base, transformer, _, adapters, saved = case
  _, params = load_transformer(base)
  plain = transformer.apply({"params": params}, *inputs())
  folded = lora.fold_scale(adapters, ALPHA)
  with_lora = transformer.apply({"params": params, "lora": folded}, *inputs())
  assert np.abs(with_lora - plain).max() > 0.05

  model = diffusers.SD3Transformer2DModel.from_pretrained(base)
  model.load_lora_adapter(str(saved), weight_name="pytorch_lora_weights.safetensors")
  np.testing.assert_allclose(torch_velocity(model), with_lora, atol=2e-4)
  wrapped = peft.PeftModel.from_pretrained(
    diffusers.SD3Transformer2DModel.from_pretrained(base), str(saved)
  )
  np.testing.assert_allclose(torch_velocity(wrapped), with_lora, atol=2e-4)
  merged = transformer.velocity(lora.merge(params, adapters, ALPHA), *inputs())
  np.testing.assert_allclose(merged, with_lora, atol=2e-4)


@pytest.mark.parametrize("writer", ["diffusers", "peft", "published"])
def test_their_files_are_read(case, tmp_path, writer):
  base, transformer, abstract, _, _ = case
  config = peft.LoraConfig(
    r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False
  )
  torch.manual_seed(3)
  model = diffusers.SD3Transformer2DModel.from_pretrained(base)
  if writer == "peft":
    model = peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path)
    path = tmp_path
  else:
    model.add_adapter(config)
    path = tmp_path / "weights.safetensors"
    if writer == "diffusers":
      model.save_lora_adapter(str(tmp_path), weight_name=path.name)
    else:  # the bare names of a module's own state
      from safetensors.torch import save_file

      state = {k: v.contiguous() for k, v in model.state_dict().items() if ".lora_" in k}
      assert any(".lora_A.default.weight" in key for key in state)
      save_file(state, path)
  adapters, alpha = load_peft(path, abstract, transformer.table)
  if writer == "published":
    alpha = ALPHA  # such a file does not say
  else:
    assert alpha == ALPHA
  _, params = load_transformer(base)
  collections = {"params": params, "lora": lora.fold_scale(adapters, alpha)}
  np.testing.assert_allclose(
    torch_velocity(model), transformer.apply(collections, *inputs()), atol=2e-4
  )
  assert jax.tree.leaves(adapters)[0].dtype == jnp.float32


@pytest.mark.parametrize("described", [False, True])
def test_the_published_flat_file_is_read(case, tmp_path, described):
  """`generator_ema.pt`: bfloat16, the adapter's name in every key, wrappers' prefixes."""
  base, transformer, abstract, _, _ = case
  config = peft.LoraConfig(r=RANK, lora_alpha=8.0, target_modules=TARGETS, init_lora_weights=False)
  torch.manual_seed(4)
  model = diffusers.SD3Transformer2DModel.from_pretrained(base)
  model.add_adapter(config)
  state = {k: v.bfloat16() for k, v in model.state_dict().items() if ".lora_" in k}
  file = tmp_path / "generator_ema.pt"
  torch.save({f"module.{key}": value for key, value in state.items()}, file)
  if described:  # the PEFT directory that the published code writes beside it
    (tmp_path / "transformer").mkdir()
    text = '{"peft_type": "LORA", "r": 4, "lora_alpha": 12}'
    (tmp_path / "transformer/adapter_config.json").write_text(text)
  adapters, alpha = load_peft(file, abstract, transformer.table)
  assert alpha == (12.0 if described else 2.0 * RANK)
  model.load_state_dict(state, strict=False)
  _, params = load_transformer(base)
  collections = {"params": params, "lora": lora.fold_scale(adapters, 8.0)}
  np.testing.assert_allclose(
    torch_velocity(model), transformer.apply(collections, *inputs()), atol=2e-4
  )
  torch.save({"model_generator": state}, file)
  with pytest.raises(UserError, match="entry 'model_generator' is no tensor"):
    load_peft(file, abstract, transformer.table)


@pytest.mark.parametrize("name", BACKBONES)
def test_peft_loads_what_training_exports(tmp_path, name):
  config, model = BACKBONES[name].stage1(), BACKBONES[name].reference()
  model.save_config(tmp_path / "base")
  transformer = build_transformer(read_config(tmp_path / "base"))
  adapters = lora.build_adapters(
    transformer.init_abstract(), transformer.table, config.lora.targets, rank=2,
    key=jax.random.key(0),
  )  # fmt: skip
  adapters = jax.tree.map(lambda x: x + 0.5, adapters)
  setup = SimpleNamespace(
    pipeline=SimpleNamespace(transformer=transformer),
    frozen=SimpleNamespace(generator={}, fake_score={}),
  )
  state = SimpleNamespace(step=3, generator=adapters, ema=adapters, fake_score=adapters)
  export.export_adapters(config, setup, state, tmp_path)
  wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "generator")
  loaded = {
    key.removeprefix("base_model.model."): value.numpy().T
    for key, value in wrapped.state_dict().items()
    if ".lora_" in key
  }
  folded = adapter_layers(lora.fold_scale(adapters, config.lora.alpha), transformer.table)
  want = {
    f"{layer}.lora_{part}.default.weight": value
    for layer, pair in folded.items()
    for part, value in zip("AB", pair, strict=True)
  }
  assert loaded.keys() == want.keys()
  for key, value in want.items():
    np.testing.assert_array_equal(loaded[key], value)
