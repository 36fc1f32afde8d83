"""The files of a model directory, as libraries write and people keep them."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from rtdmd_jax.errors import UserError
from rtdmd_jax.models import build_transformer
from rtdmd_jax.models.encoders import load_t5
from rtdmd_jax.weights.directory import weight_files
from rtdmd_jax.weights.safetensors import load_params, read_config

SINGLE = "diffusion_pytorch_model{}.safetensors"
SHARD = "diffusion_pytorch_model{}-0000{}-of-00002{}.safetensors"
INDEX = "diffusion_pytorch_model.safetensors{}.json"


def touch(directory, *names):
  for name in names:
    save_file({"x": np.zeros(1, np.float32)}, directory / name)


def index(directory, name, shards):
  (directory / name).write_text(json.dumps({"weight_map": dict.fromkeys("ab", shards[-1])}))
  return directory / name


def names(directory):
  return [file.name for file in weight_files(directory)]


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_variant_is_read_where_the_plain_weights_are_missing(tmp_path, variant):
  touch(tmp_path, SINGLE.format(f".{variant}"), "extra.pickletensors")
  (tmp_path / "README.md").write_text("not weights")
  assert names(tmp_path) == [SINGLE.format(f".{variant}")]
  touch(tmp_path, SINGLE.format(""))
  assert names(tmp_path) == [SINGLE.format("")]


@pytest.mark.parametrize(
  "index_name, shard",
  [
    (INDEX.format(".index.fp16"), (".fp16", "")),
    (INDEX.format(".fp16.index"), ("", ".fp16")),  # of older releases
  ],
)
def test_the_index_of_sharded_variants(tmp_path, index_name, shard):
  front, back = shard
  shards = [SHARD.format(front, i, back) for i in (1, 2)]
  touch(tmp_path, *shards)
  with pytest.raises(UserError, match=f"{shards[0]}, but not the .safetensors.index.json"):
    weight_files(tmp_path)
  index(tmp_path, index_name, shards)
  assert names(tmp_path) == shards[1:]
  # Whoever fetched "*.json" has the index of the plain weights, without them.
  plain = [SHARD.format("", i, "") for i in (1, 2)]
  index(tmp_path, INDEX.format(".index"), plain)
  assert names(tmp_path) == shards[1:]
  touch(tmp_path, plain[1])
  assert names(tmp_path) == plain[1:]


@pytest.mark.parametrize(
  "files, message",
  [
    (["model.fp16.safetensors", "model.bf16.safetensors"], "several checkpoints"),
    (["model.safetensors", "diffusion_pytorch_model.safetensors"], "several checkpoints"),
    (["pytorch_model.bin"], r"no .safetensors file .* \(but pytorch_model.bin, which is not read"),
    (["flux1-dev-Q4_K.gguf"], r"but flux1-dev-Q4_K.gguf"),
  ],
)
def test_what_is_no_single_checkpoint(tmp_path, files, message):
  touch(tmp_path, *files)
  with pytest.raises(UserError, match=message):
    weight_files(tmp_path)


def test_a_file_of_another_format_is_named(tmp_path):
  touch(tmp_path, "flux1-dev-Q4_K.gguf")
  with pytest.raises(UserError, match=r"Q4_K.gguf is a .gguf file; give .* unquantised"):
    weight_files(tmp_path / "flux1-dev-Q4_K.gguf")


@pytest.mark.parity
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_that_diffusers_wrote(tmp_path, variant):
  diffusers = pytest.importorskip("diffusers")
  model = diffusers.SD3Transformer2DModel(
    sample_size=4,
    in_channels=4,
    num_layers=2,
    attention_head_dim=4,
    num_attention_heads=2,
    joint_attention_dim=8,
    caption_projection_dim=8,
    pooled_projection_dim=8,
    out_channels=4,
    pos_embed_max_size=4,
  )
  model.save_pretrained(tmp_path, max_shard_size="8KB", variant=variant)
  assert len(list(tmp_path.glob("*.safetensors"))) > 2
  built = build_transformer(read_config(tmp_path))
  params = load_params(tmp_path, built.init_abstract(), built.table)
  total = sum(float(p.detach().abs().sum()) for p in model.state_dict().values())
  assert sum(float(abs(leaf).sum()) for leaf in jax.tree.leaves(params)) == pytest.approx(total)


@pytest.mark.parity
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_that_transformers_wrote(tmp_path, variant):
  transformers = pytest.importorskip("transformers")
  config = transformers.T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_heads=2)
  model = transformers.T5EncoderModel(config)
  model.save_pretrained(tmp_path, max_shard_size="2KB", variant=variant)
  assert len(list(tmp_path.glob("*.safetensors"))) > 2
  _, params = load_t5(tmp_path)
  np.testing.assert_array_equal(params["shared"]["embedding"], model.shared.weight.detach())
