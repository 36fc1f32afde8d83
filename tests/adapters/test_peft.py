import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rtdmd_jax.adapters.peft import load_peft, save_peft
from rtdmd_jax.errors import UserError
from rtdmd_jax.weights.key_table import KeyTable, Stack

TABLE = KeyTable(
  stacks=[Stack("blocks_0", "transformer_blocks")],
  renames=[(r"^last_block\b", "transformer_blocks.2"), (r"\bto_out_0$", "to_out.0")],
)
TARGETS = ["attn.to_q", "attn.to_out.0"]


def kernel(*shape):
  return {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}


ABSTRACT = {
  "blocks_0": {"attn": {"to_q": kernel(2, 6, 8), "to_out_0": kernel(2, 8, 6)}},
  "last_block": {"attn": {"to_q": kernel(6, 8)}},
  "proj_out": kernel(6, 4),
}


def adapters():
  rng = np.random.default_rng(0)

  def entry(*shape):
    *stack, n_in, n_out = shape
    return {
      "a": jnp.asarray(rng.standard_normal((*stack, n_in, 3)), jnp.float32),
      "b": jnp.asarray(rng.standard_normal((*stack, 3, n_out)), jnp.float32),
    }

  return {
    "blocks_0": {"attn": {"to_q": entry(2, 6, 8), "to_out_0": entry(2, 8, 6)}},
    "last_block": {"attn": {"to_q": entry(6, 8)}},
  }


@pytest.fixture
def saved(tmp_path):
  save_peft(tmp_path / "lora", adapters(), TABLE, rank=3, alpha=6.0, targets=TARGETS)
  return tmp_path / "lora"


def load(path):
  return load_peft(path, ABSTRACT, TABLE)


def assert_same(got, want, scale=1.0):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(x, y * (scale if path[-1].key == "b" else 1.0), rtol=1e-6)
    assert x.dtype == jnp.float32


def test_round_trip_of_a_directory(saved):
  got, alpha = load(saved)
  assert alpha == 6.0
  assert_same(got, adapters())
  moved = saved.rename(saved.parent / "transformer")
  assert_same(load(moved.parent)[0], adapters())


def test_names_and_layout(saved):
  assert sorted(p.name for p in saved.iterdir()) == [
    "adapter_config.json",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
  ]
  tensors = load_file(saved / "adapter_model.safetensors")
  key = "base_model.model.transformer_blocks.1.attn.to_out.0.lora_B.weight"
  want = adapters()["blocks_0"]["attn"]["to_out_0"]["b"][1].T
  np.testing.assert_array_equal(tensors[key], want)
  assert "base_model.model.transformer_blocks.2.attn.to_q.lora_A.weight" in tensors
  assert len(tensors) == 10
  config = json.loads((saved / "adapter_config.json").read_text())
  assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 6.0, TARGETS)


def test_the_pipeline_file_carries_the_scale(saved):
  got, alpha = load(saved / "pytorch_lora_weights.safetensors")
  assert alpha == 3.0
  assert_same(got, adapters(), scale=2.0)
  for name in ("adapter_config.json", "adapter_model.safetensors"):
    (saved / name).unlink()
  assert_same(load(saved)[0], adapters(), scale=2.0)


@pytest.mark.parametrize(
  "rename",
  [
    lambda key: key,
    lambda key: f"transformer.{key}",
    lambda key: f"base_model.model.{key}",
    lambda key: f"base_model.model.transformer.{key}",
    lambda key: key.replace(".weight", ".default.weight"),
    lambda key: "base_model.model." + key.replace(".weight", ".default.weight"),
  ],
)
def test_key_styles_of_a_lone_file(saved, tmp_path, rename):
  tensors = load_file(saved / "adapter_model.safetensors")
  bare = {key.removeprefix("base_model.model."): x for key, x in tensors.items()}
  file = tmp_path / "flat.safetensors"
  save_file({rename(key): x for key, x in bare.items()}, file)
  got, alpha = load(file)
  assert alpha == 3.0
  assert_same(got, adapters())


def rewrite(saved, change, **options):
  file = saved / "adapter_model.safetensors"
  tensors = {k.removeprefix("base_model.model."): x for k, x in load_file(file).items()}
  change(tensors)
  out = saved.parent / "changed.safetensors"
  save_file(tensors, out, **options)
  return out


def test_alpha_of_a_lone_file(saved):
  notes = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 12, "transformer.r": 3})}
  assert load(rewrite(saved, lambda t: None, metadata=notes))[1] == 12.0

  def add_alphas(tensors):
    for key in [k for k in tensors if ".lora_A." in k]:
      tensors[key.replace(".lora_A.weight", ".alpha")] = np.asarray(1.5, np.float32)

  got, alpha = load(rewrite(saved, add_alphas))
  assert alpha == 1.5
  assert_same(got, adapters())

  def add_one(tensors):
    tensors["transformer_blocks.0.attn.to_q.alpha"] = np.asarray(1.5, np.float32)

  with pytest.raises(UserError, match="has .alpha keys, but none of"):
    load(rewrite(saved, add_one))
  with pytest.raises(UserError, match="says alpha as well"):
    load(rewrite(saved, add_alphas, metadata=notes))


@pytest.mark.parametrize("value", [np.float32(np.inf), np.zeros((2,)), np.float32(0)])
def test_an_alpha_that_is_no_positive_number_is_refused(saved, value):
  def change(tensors):
    for key in [k for k in tensors if ".lora_A." in k]:
      tensors[key.replace(".lora_A.weight", ".alpha")] = np.asarray(value, np.float32)

  with pytest.raises(UserError, match=r"\.alpha"):
    load(rewrite(saved, change))


@pytest.mark.parametrize(
  ("header", "message"),
  [
    ({"lora_alpha": "6"}, "lora_alpha in its header is 6"),
    ({"ss_network_alpha": "1.0", "ss_network_dim": "3"}, "ss_network_alpha in its header is 1"),
    ({"alpha": "four"}, "alpha in its header is nan"),
    ({"use_rslora": "True"}, "use_rslora = 'True'"),
    ({"lora_adapter_metadata": '{"text_encoder.r": 3}'}, "'r'"),
  ],
)
def test_a_header_that_readers_pass_over_is_named(saved, header, message):
  with pytest.raises(UserError, match=message):
    load(rewrite(saved, lambda t: None, metadata=header))

  def prefix(tensors):
    for key in list(tensors):
      tensors["transformer." + key] = tensors.pop(key)

  notes = {"lora_adapter_metadata": '{"r": 3, "lora_alpha": 6}'}
  assert load(rewrite(saved, lambda t: None, metadata=notes))[1] == 6.0
  with pytest.raises(UserError, match="notes lack the prefix 'transformer.'"):
    load(rewrite(saved, prefix, metadata=notes))
  same = {"lora_alpha": "3", "ss_network_alpha": "3.0", "alpha": "None", "use_dora": "False"}
  assert load(rewrite(saved, lambda t: None, metadata=same))[1] == 3.0


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_is_read_by_value(saved, kind):
  values = {}

  def lower(tensors):
    for key in tensors:
      values[key] = tensors[key].astype(kind)
    tensors.update({key: value.view(np.uint8) for key, value in values.items()})

  file = rewrite(saved, lower)
  content = file.read_bytes()
  name = {"float8_e4m3fn": b"F8_E4M3", "float8_e5m2": b"F8_E5M2"}[kind]
  length = int.from_bytes(content[:8], "little")
  header = content[8 : 8 + length].replace(b'"U8"', b'"%s"' % name).rstrip()
  file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
  want = jax.tree.map(lambda x: x.astype(kind).astype(jnp.float32), adapters())
  assert_same(load(file)[0], want)


def test_bfloat16_is_read_as_float32(saved):
  def lower(tensors):
    for key in tensors:
      tensors[key] = tensors[key].astype(jnp.bfloat16)

  got, _ = load(rewrite(saved, lower))
  want = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), adapters())
  assert_same(got, want)


Q = "transformer_blocks.1.attn.to_q.lora_{}.weight"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda t: t.pop(Q.format("A")), r"lacks lora_A .* of transformer_blocks\.1\.attn\.to_q\."),
    (lambda t: t.pop(Q.format("B")), r"lacks lora_B .* of transformer_blocks\.1\.attn\.to_q\."),
    (lambda t: t.update({"proj_in.lora_A.weight": np.zeros((3, 6))}), r"no dense layer proj_in"),
    (lambda t: t.update({"proj_out.weight": np.zeros((4, 6))}), r"key proj_out\.weight"),
    (lambda t: t.update({Q.format("A"): np.zeros((3, 7))}), r"\(3, 7\), expected \(3, 6\)"),
    (lambda t: t.update({Q.format("B"): np.zeros((8, 2))}), r"\(8, 2\), expected \(8, 3\)"),
    (
      lambda t: t.update({Q.format("A"): np.zeros((2, 6)), Q.format("B"): np.zeros((8, 2))}),
      r"mixes ranks \[2, 3\]",
    ),
    (
      lambda t: t.update({"transformer." + Q.format("A"): np.zeros((3, 6))}),
      r"name the same adapter",
    ),
    (lambda t: t.clear(), "no LoRA weights"),
    (lambda t: t.update({Q.format("A"): np.zeros((3, 6), np.int8)}), r"to_q\.lora_A.* type int8"),
    (lambda t: t.update({Q.format("B"): np.full((8, 3), np.nan)}), r"to_q\.lora_B.* not finite"),
  ],
)
def test_strictness_names_the_key(saved, change, message):
  with pytest.raises(UserError, match=message):
    load(rewrite(saved, change))


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"use_rslora": "yes"}, "use_rslora"),
    ({"peft_type": "LOHA"}, "LOHA"),
    ({"rank_pattern": {"attn.to_q": 8}}, "r = 8 of transformer_blocks.0.attn.to_q"),
    ({"rank_pattern": {"(": 8}}, "no regular expression"),
    ({"alpha_pattern": [1]}, "alpha_pattern"),
    ({"alpha_pattern": {"attn.to_q": -1}}, "attn.to_q"),
    ({"r": 4}, "r = 4"),
    ({"lora_alpha": None}, "lora_alpha"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
    ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ({"init_lora_weights": "corda"}, "init_lora_weights"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights"),
    ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
    ({"use_dora": True}, "use_dora"),
    ({"bias": "all"}, "bias"),
    ({"lora_bias": True}, "lora_bias"),
    ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ({"target_parameters": ["weight"]}, "target_parameters"),
    ({"a_field_of_tomorrow": 3}, "a_field_of_tomorrow"),
    ({"target_modules": ["attn.to_q"]}, "leaves out layer transformer_blocks.0.attn.to_out.0"),
    ({"exclude_modules": ["to_q"]}, "leaves out layer .*to_q"),
    ({"layers_to_transform": [0], "layers_pattern": "transformer_blocks"}, "leaves out"),
  ],
)
def test_unsupported_configs_are_named(saved, values, message):
  file = saved / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | values))
  with pytest.raises(UserError, match=message):
    load(saved)


def test_missing_and_broken_files(saved, tmp_path):
  with pytest.raises(UserError, match="is no adapter"):
    load(tmp_path / "nowhere")
  (saved / "adapter_config.json").write_text("{")
  with pytest.raises(UserError, match="is not JSON"):
    load(saved)
  (saved / "adapter_model.safetensors").write_bytes(b"x")
  with pytest.raises(UserError, match="not a whole safetensors"):
    load(saved / "adapter_model.safetensors")
  (saved / "adapter_config.json").unlink()
  (saved / "adapter_model.safetensors").unlink()
  (saved / "pytorch_lora_weights.safetensors").rename(saved / "one.safetensors")
  assert load(saved)[1] == 3.0
  shutil.copy(saved / "one.safetensors", saved / "two.safetensors")
  with pytest.raises(UserError, match="2 other safetensors files"):
    load(saved)


def test_a_config_belongs_to_the_file_with_pefts_name(saved):
  assert load(saved / "adapter_model.safetensors")[1] == 6.0
  assert load(saved / "pytorch_lora_weights.safetensors")[1] == 3.0
  other = saved / "other.safetensors"
  shutil.copy(saved / "pytorch_lora_weights.safetensors", other)
  assert load(other)[1] == 3.0
  (saved / "adapter_model.safetensors").unlink()
  with pytest.raises(UserError, match="lies beside adapter_config.json"):
    load(other)
  (saved / "adapter_config.json").unlink()
  other.rename(saved / "adapter_model.safetensors")
  with pytest.raises(UserError, match="adapter_config.json cannot be read"):
    load(saved / "adapter_model.safetensors")


def test_saving_checks_the_rank(tmp_path):
  with pytest.raises(ValueError, match="expected rank 4"):
    save_peft(tmp_path, adapters(), TABLE, rank=4, alpha=4.0, targets=TARGETS)
