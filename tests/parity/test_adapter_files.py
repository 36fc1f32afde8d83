"""Adapter files of other trainers: each has diffusers' or PEFT's own effect, or is refused by name.

Ten kinds in three families, and what files of each kind may hold besides.
"""

import copy

import numpy as np
import pytest

from rtdmd_jax.adapters.comfyui import fused_layers
from rtdmd_jax.adapters.layers import read_layers
from rtdmd_jax.adapters.load import Lora, load_adapters
from rtdmd_jax.adapters.lora import dense_entries
from rtdmd_jax.adapters.names import layer_names
from rtdmd_jax.errors import UserError
from rtdmd_jax.models import build_transformer
from tests.parity.backbones import BACKBONES, inputs, loaded

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
from safetensors.torch import load_file, save_file  # noqa: E402

from tests.parity.adapter_kinds import (  # noqa: E402  needs all three
  DOWN_UP,
  KINDS,
  NAME,
  PIPELINES,
  assert_same,
  by_diffusers,
  diffusers_model,
  drawn,
  each,
  linears,
  ours,
  small,
  theirs,
  underscored,
  write,
)

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=PIPELINES)
def family(request):
  return small(request.param)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_kind_has_the_effect_of_its_own_loader_or_is_refused(
  family, kind, tmp_path, monkeypatch
):
  path, want = kind(family, tmp_path, monkeypatch)
  if isinstance(want, str):
    with pytest.raises(UserError, match=want):
      ours(family, path)
  else:
    assert_same(ours(family, path), want)


@pytest.mark.slow
def test_the_velocity_changes_as_diffusers_does(family, tmp_path):
  """Some layers of a stack, of several ranks."""
  backbone = BACKBONES[family.name]
  kept = lambda name: "blocks.0" not in name and name.endswith(("to_k", "to_out.0", "proj_out"))  # noqa: E731
  pairs = drawn(linears(family, kept), rank=lambda i: 1 + i % 3)
  path = write(tmp_path / NAME, {k: (a, 0.1 * b) for k, (a, b) in pairs.items()}, "transformer.{}")
  model, transformer, params = family.model, *loaded(family.model, tmp_path / "base")
  latents, tokens, pooled = inputs(transformer)
  sigma = np.float32([0.9, 0.25])
  guidance = np.float32([3.5, 1.0]) if transformer.embedded_guidance else None
  adapted = diffusers_model(family, path)
  with torch.no_grad():
    plain, want = (
      backbone.run(m, torch.tensor(latents), sigma, tokens, pooled, guidance).numpy()
      for m in (model, adapted)
    )
  args = (latents, sigma, tokens, pooled, guidance)
  tree = load_adapters([Lora(path)], transformer)
  got = transformer.apply({"params": params, "lora": tree}, *args) - transformer.velocity(
    params, *args
  )
  want = want - plain
  assert np.abs(want).max() > 0.05
  assert np.linalg.norm(got - want) < 1e-4 * np.linalg.norm(want)


@pytest.fixture(scope="module")
def published():
  """FLUX.1 of its published size, shapes alone: two of diffusers' converters know no other."""
  config = dict(num_layers=19, num_single_layers=38, guidance_embeds=True)
  config |= dict(attention_head_dim=128, num_attention_heads=24, joint_attention_dim=4096)
  config |= dict(pooled_projection_dim=768, axes_dims_rope=(16, 56, 56), in_channels=64)
  transformer = build_transformer({"_class_name": "FluxTransformer2DModel"} | config)
  entries = dense_entries(transformer.init_abstract(), transformer.table)
  return layer_names(transformer.names, entries), fused_layers(transformer.names, entries)


@pytest.mark.parametrize("writer", ["kohya", "fal"])
def test_fused_layers_of_flux1_are_split_as_diffusers_does(published, tmp_path, writer):
  names, native = published
  embedders = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer.adaLN")
  chosen = [
    (name, sum(rows for _, rows in layer.parts), layer.inputs)
    for name, layer in native.items()
    if (".linear1" in name and ".3." in name if writer == "kohya" else True)
    and not name.startswith(embedders)
  ]
  pairs = drawn(chosen, rank=lambda i: 1)
  if writer == "kohya":
    alphas = each(pairs)
    path = write(tmp_path / NAME, pairs, underscored("lora_unet_"), DOWN_UP, alphas)
  else:
    path = write(tmp_path / NAME, pairs, "base_model.model.{}")
  state = diffusers.FluxPipeline.lora_state_dict(str(tmp_path), weight_name=NAME)
  layers = read_layers(path, names)
  assert {f"transformer.{module}.lora_A.weight" for module in layers} == {
    key for key in state if ".lora_A." in key
  }
  for module, layer in layers.items():
    a, b = (state[f"transformer.{module}.lora_{part}.weight"].numpy() for part in "AB")
    # Of rank one, so that A and B are the same but for a factor.
    probe = np.ones(a.shape[1], np.float32)
    want = b @ (a @ probe)
    got = layer.scale * (probe @ layer.a) @ layer.b
    assert np.linalg.norm(got - want) < 1e-4 * np.linalg.norm(want), module
    assert np.linalg.norm(np.cross(a[0, :3], layer.a[:3, 0])) < 1e-4, module


@pytest.fixture(scope="module")
def flux1():
  return small("flux1")


def some(family):
  return drawn(linears(family, lambda name: name.endswith("attn.to_k")))


def test_pytorch_files_have_diffusers_effect_or_the_published_scale(flux1, tmp_path):
  file = write(tmp_path / NAME, some(flux1), "transformer.{}")
  want = by_diffusers(flux1, file)
  assert_same(ours(flux1, tmp_path), want)
  state = load_file(file)
  file.unlink()
  for name in ("pytorch_lora_weights.bin", "generator_ema.pt", "fake_score_net.pth", "renamed.pt"):
    torch.save(state, tmp_path / name)
  assert_same(ours(flux1, tmp_path), want)
  assert_same(ours(flux1, tmp_path, -0.5), {k: -0.5 * v for k, v in want.items()})
  for name in ("generator_ema.pt", "fake_score_net.pth"):
    assert_same(ours(flux1, tmp_path / name), {k: 2 * v for k, v in want.items()})
  with pytest.raises(UserError, match=r"renamed\.pt says no alpha"):
    ours(flux1, tmp_path / "renamed.pt")
  with pytest.raises(UserError, match="nan; give a finite number"):
    ours(flux1, tmp_path, float("nan"))


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_is_read_by_value(flux1, tmp_path, kind):
  state = load_file(write(tmp_path / NAME, some(flux1), "transformer.{}"))
  low = {k: v.to(getattr(torch, kind)) for k, v in state.items()}
  save_file({k: v.float() for k, v in low.items()}, tmp_path / NAME)
  want = by_diffusers(flux1, tmp_path / NAME)
  save_file(low, tmp_path / "low.safetensors")
  torch.save(low, tmp_path / "low.bin")
  assert_same(ours(flux1, tmp_path / "low.safetensors"), want)
  assert_same(ours(flux1, tmp_path / "low.bin"), want)


@pytest.mark.parametrize("older", ["lora.down", "processor", "shortened"])
def test_older_names_have_diffusers_effect(family, tmp_path, older):
  pairs = drawn(linears(family, lambda n: n.endswith(("attn.to_q", "attn.to_k"))))
  if older == "lora.down":
    file = write(tmp_path / NAME, pairs, "transformer.{}", ("lora.down", "lora.up"))
  elif older == "shortened":
    if family.name != "flux2":
      pytest.skip("known of FLUX.2 alone")
    name = lambda layer: f"diffusion_model.{layer.removeprefix('tran')}"  # noqa: E731
    file = write(tmp_path / NAME, pairs, name)
  elif family.name == "flux1":
    pytest.skip("diffusers takes these names for XLabs' there")
  else:
    name = lambda layer: f"transformer.{layer}_lora".replace(".to_", ".processor.to_")  # noqa: E731
    file = write(tmp_path / NAME, pairs, name, ("down", "up"))
  assert_same(ours(family, file), by_diffusers(family, file))


@pytest.mark.parametrize("prefix", ["transformer.{}", "lycoris_", "module.base_model.model.{}"])
def test_down_up_and_alpha_mean_the_same_under_every_name(family, tmp_path, prefix):
  pairs = drawn(linears(family, lambda n: n.endswith(("attn.to_k", "to_out.0"))))
  alphas = each(pairs)
  name = prefix if "{}" in prefix else underscored(prefix)
  path = write(tmp_path / "x.safetensors", pairs, name, DOWN_UP, alphas)
  folded = {k: (down, alphas[k] / len(down) * up) for k, (down, up) in pairs.items()}
  want = by_diffusers(family, write(tmp_path / NAME, folded, "transformer.{}"))
  assert_same(ours(family, path), want)


REFUSED = {
  "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": "adapter of a text encoder",
  "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": "adapter of a text encoder",
  "text_encoders.clip_l.transformer.text_model.x.lora_up.weight": "adapter of a text encoder",
  "{}.dora_scale": "a magnitude of DoRA",
  "transformer.{}.lora_magnitude_vector": "a magnitude of DoRA",
  "lycoris_{}.hada_w1_a": "a factor of LoHa",
  "diffusion_model.{}.lokr_w1": "a factor of LoKr",
  "{}.oft_blocks": "a rotation of OFT",
  "{}.oft_R.weight": "a rotation of OFT",
  "{}.diff_b": "a change of a whole weight",
  "{}.lora_B.bias": "a bias",
  "{}.lora_mid.weight": "a LoRA of a convolution",
  "{}.lora_A": "which is no LoRA weight",
  "base_model.model.{}.lora_A.second.weight": "name the same adapter",
  "transformer_blocks.77.attn.to_k.lora_A.weight": "no dense layer transformer_blocks.77",
  "pos_embed.proj.lora_A.weight": "no dense layer pos_embed.proj",
}


@pytest.mark.parametrize(("key", "words"), REFUSED.items(), ids=REFUSED)
def test_what_is_not_plain_lora_of_the_transformer_is_refused(flux1, tmp_path, key, words):
  pairs = some(flux1)
  path = write(tmp_path / NAME, pairs)
  key = key.format(next(iter(pairs)))
  save_file(load_file(path) | {key: torch.ones(4, 4)}, path)
  with pytest.raises(UserError, match=words) as error:
    ours(flux1, path)
  assert key in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("init", ["pissa", "olora", "mica", "orthogonal", "gaussian", "eva"])
def test_inits_that_change_the_base_are_refused_and_no_others(flux1, tmp_path, init):
  """PEFT itself says which: setting up such an adapter changes the base's weights."""
  config = peft.LoraConfig(r=4, target_modules=["attn.to_k"], init_lora_weights=init)
  model = peft.get_peft_model(copy.deepcopy(flux1.model), config)
  name = next(name for name, *_ in linears(flux1) if name.endswith("attn.to_k"))
  base = model.get_submodule(f"base_model.model.{name}").get_base_layer()
  with torch.no_grad():
    for key, parameter in model.named_parameters():
      if ".lora_" in key:
        parameter.normal_()
  model.save_pretrained(tmp_path)
  if torch.equal(base.weight, flux1.model.get_submodule(name).weight):
    assert_same(ours(flux1, tmp_path), theirs(model))
  else:
    assert init in ("pissa", "olora")
    with pytest.raises(UserError, match=f"init_lora_weights = '{init}'"):
      ours(flux1, tmp_path)
