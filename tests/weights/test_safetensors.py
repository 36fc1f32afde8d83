import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rtdmd_jax.errors import UserError
from rtdmd_jax.weights.int8 import int8_shapes
from rtdmd_jax.weights.key_table import KeyTable, Stack
from rtdmd_jax.weights.safetensors import (
  checkpoint_dtype,
  load_params,
  read_config,
  save_model,
  save_params,
)

TABLE = KeyTable(stacks=[Stack("blocks", "layers", 1)], renames=[(r"\bout_(\d+)\b", r"out.\1")])


def tree(dtype=np.float32):
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.standard_normal(shape).astype(dtype)

  return {
    "blocks": {
      "out_0": {"kernel": draw(2, 3, 4), "bias": draw(2, 4)},
      "norm": {"scale": draw(2, 3)},
    },
    "conv": {"kernel": draw(2, 2, 3, 5)},
    "embed": {"embedding": draw(6, 3)},
    "logit_scale": draw(),
  }


def checkpoint():
  p = tree()
  return {
    "layers.1.out.0.weight": p["blocks"]["out_0"]["kernel"][0].T.copy(),
    "layers.2.out.0.weight": p["blocks"]["out_0"]["kernel"][1].T.copy(),
    "layers.1.out.0.bias": p["blocks"]["out_0"]["bias"][0],
    "layers.2.out.0.bias": p["blocks"]["out_0"]["bias"][1],
    "layers.1.norm.weight": p["blocks"]["norm"]["scale"][0],
    "layers.2.norm.weight": p["blocks"]["norm"]["scale"][1],
    "conv.weight": np.einsum("hwio->oihw", p["conv"]["kernel"]).copy(),
    "embed.weight": p["embed"]["embedding"],
    "logit_scale": p["logit_scale"],
  }


def abstract(dtype=jnp.float32):
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), tree())


def write_shards(directory, tensors, drop_from_index=(), extra_index=()):
  names = sorted(tensors)
  shards = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
  weight_map = {k: f for f, ks in shards.items() for k in ks if k not in drop_from_index}
  weight_map.update(extra_index)
  for file, keys in shards.items():
    save_file({k: tensors[k] for k in keys}, directory / file)
  index = directory / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  return index


def assert_trees_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_loads_single_file_by_path_and_by_directory(tmp_path):
  file = tmp_path / "diffusion_pytorch_model.safetensors"
  save_file(checkpoint(), file)
  assert_trees_equal(load_params(file, abstract(), TABLE), tree())
  assert_trees_equal(load_params(tmp_path, abstract(), TABLE), tree())


def test_canonical_name_wins_over_variants(tmp_path):
  save_file(checkpoint(), tmp_path / "model.safetensors")
  save_file({"x": np.zeros(1)}, tmp_path / "model.fp16.safetensors")
  assert_trees_equal(load_params(tmp_path, abstract(), TABLE), tree())


def test_loads_shards(tmp_path):
  write_shards(tmp_path, checkpoint())
  assert_trees_equal(load_params(tmp_path, abstract(), TABLE), tree())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_reads_bfloat16_and_casts(tmp_path, dtype):
  stored = {k: v.astype(ml_dtypes.bfloat16) for k, v in checkpoint().items()}
  save_file(stored, tmp_path / "model.safetensors")
  got = load_params(tmp_path, abstract(), TABLE, dtype=dtype)
  want = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16).astype(dtype), tree())
  assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(got))
  assert_trees_equal(got, want)


def test_dtype_defaults_to_the_abstract_leaf_and_leaves_integers_alone(tmp_path):
  save_file({"ids": np.arange(3), "w": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
  shapes = {
    "ids": jax.ShapeDtypeStruct((3,), jnp.int32),
    "w": jax.ShapeDtypeStruct((2,), jnp.float16),
  }
  got = load_params(tmp_path, shapes, KeyTable())
  assert (got["ids"].dtype, got["w"].dtype) == (jnp.int32, jnp.float16)
  got = load_params(tmp_path, shapes, KeyTable(), dtype=jnp.bfloat16)
  assert (got["ids"].dtype, got["w"].dtype) == (jnp.int32, jnp.bfloat16)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_is_read_by_value(tmp_path, name):
  stored = {k: v.astype(getattr(ml_dtypes, name)) for k, v in checkpoint().items()}
  save_file(stored, tmp_path / "model.safetensors")
  got = load_params(tmp_path, abstract(), TABLE)
  assert_trees_equal(got, jax.tree.map(lambda a: a.astype(getattr(ml_dtypes, name)), tree()))
  with pytest.raises(UserError, match=f"types {name}; say which one"):
    checkpoint_dtype(tmp_path)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_that_pytorch_wrote(tmp_path, name):
  torch = pytest.importorskip("torch")
  from safetensors.torch import save_file as save_torch

  values = torch.linspace(-3, 3, 64).reshape(8, 8).to(getattr(torch, name))
  save_torch({"q.weight": values}, tmp_path / "model.safetensors")
  shapes = {"q": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}}
  got = load_params(tmp_path, shapes, KeyTable())["q"]["kernel"]
  np.testing.assert_array_equal(got.T, values.float().numpy())


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.bool_])
@pytest.mark.parametrize("storage", ["native", "int8"])
def test_whole_numbers_are_no_weights(tmp_path, dtype, storage):
  shapes = {"q": {"kernel": jax.ShapeDtypeStruct((3, 3), jnp.float32)}}
  shapes = int8_shapes(shapes, KeyTable()) if storage == "int8" else shapes
  save_file({"q.weight": np.ones((3, 3), dtype)}, tmp_path / "model.safetensors")
  with pytest.raises(
    UserError, match=rf"q\.weight has type {np.dtype(dtype)}; give floating-point"
  ):
    load_params(tmp_path, shapes, KeyTable())
  save_file({"q.weight": np.ones((3, 3), np.float16)}, tmp_path / "model.safetensors")
  load_params(tmp_path, shapes, KeyTable())


@pytest.mark.parametrize(
  "key, words",
  [
    ("conv.scale_weight", "scaled float8 weights of ComfyUI"),
    ("scaled_fp8", "scaled float8 weights of ComfyUI"),
    ("conv.weight.absmax", "bitsandbytes"),
    ("conv.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
    ("conv.SCB", "bitsandbytes"),
    ("conv._weight_qdata", "torchao"),
    ("conv.weight._data", "quanto"),
    ("conv.qweight", "GPTQ, AWQ or SVDQuant"),
    ("conv.weight_scale", "scaled, quantised weights"),
  ],
)
def test_quantised_weights_are_refused_by_name(tmp_path, key, words):
  save_file(checkpoint() | {key: np.ones(1, np.float32)}, tmp_path / "model.safetensors")
  with pytest.raises(UserError, match=rf"model\.safetensors holds {key}, a part of .*{words}"):
    load_params(tmp_path, abstract(), TABLE)


def test_places_leaves_on_the_given_shardings(tmp_path):
  save_file(checkpoint(), tmp_path / "model.safetensors")
  mesh = jax.make_mesh((1,), ("data",))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  for sharding in (place, jax.tree.map(lambda _: place, abstract())):
    got = load_params(tmp_path, abstract(), TABLE, sharding=sharding)
    assert all(leaf.sharding == place for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_save_writes_the_checkpoint_layout(tmp_path, dtype):
  file = tmp_path / "new" / "model.safetensors"
  save_params(file, jax.tree.map(jnp.asarray, tree()), TABLE, dtype=dtype)
  stored = load_file(file)
  assert stored.keys() == checkpoint().keys()
  for key, want in checkpoint().items():
    assert stored[key].shape == want.shape
    np.testing.assert_array_equal(stored[key], want if dtype is None else want.astype(dtype))
  assert [f.name for f in file.parent.iterdir()] == ["model.safetensors"]


def test_a_saved_model_directory_reads_back(tmp_path):
  save_model(tmp_path / "new/model.safetensors", {"hidden_size": 4}, tree(), TABLE)
  assert read_config(tmp_path / "new") == {"hidden_size": 4}
  loaded = load_params(tmp_path / "new", abstract(), TABLE)
  jax.tree.map(np.testing.assert_array_equal, loaded, tree())


def test_unknown_key_is_named_unless_ignored(tmp_path):
  file = tmp_path / "model.safetensors"
  save_file(checkpoint() | {"stray.position_ids": np.zeros(2)}, file)
  with pytest.raises(UserError, match=r"model\.safetensors.*stray\.position_ids"):
    load_params(file, abstract(), TABLE, ignore=["stray"])
  got = load_params(file, abstract(), TABLE, ignore=[r".*\.position_ids"])
  assert_trees_equal(got, tree())


def test_missing_key_is_named(tmp_path):
  tensors = checkpoint()
  del tensors["layers.2.norm.weight"]
  save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(UserError, match=r"layers\.2\.norm\.weight"):
    load_params(tmp_path, abstract(), TABLE)


def test_wrong_shape_is_named_with_both_shapes(tmp_path):
  save_file(checkpoint() | {"embed.weight": np.zeros((6, 4))}, tmp_path / "model.safetensors")
  with pytest.raises(UserError, match=r"embed\.weight has shape \(6, 4\), expected \(6, 3\)"):
    load_params(tmp_path, abstract(), TABLE)


def test_square_kernel_is_transposed(tmp_path):
  weight = np.arange(9, dtype=np.float32).reshape(3, 3)
  save_file({"q.weight": weight}, tmp_path / "model.safetensors")
  shapes = {"q": {"kernel": jax.ShapeDtypeStruct((3, 3), jnp.float32)}}
  np.testing.assert_array_equal(load_params(tmp_path, shapes, KeyTable())["q"]["kernel"], weight.T)


def test_truncated_file(tmp_path):
  file = tmp_path / "model.safetensors"
  save_file(checkpoint(), file)
  file.write_bytes(file.read_bytes()[:-5])
  with pytest.raises(UserError, match=r"model\.safetensors is not a whole"):
    load_params(tmp_path, abstract(), TABLE)


def test_missing_files(tmp_path):
  with pytest.raises(UserError, match="does not exist"):
    load_params(tmp_path / "nowhere", abstract(), TABLE)
  with pytest.raises(UserError, match="holds no .safetensors"):
    load_params(tmp_path, abstract(), TABLE)


def test_several_checkpoints_are_ambiguous(tmp_path):
  write_shards(tmp_path, checkpoint())
  save_file(checkpoint(), tmp_path / "model.safetensors")
  with pytest.raises(UserError, match="several checkpoints"):
    load_params(tmp_path, abstract(), TABLE)


def test_missing_shard(tmp_path):
  write_shards(tmp_path, checkpoint())
  (tmp_path / "b.safetensors").unlink()
  with pytest.raises(UserError, match=r"b\.safetensors is missing"):
    load_params(tmp_path, abstract(), TABLE)


def test_key_the_index_promises_but_the_shard_lacks(tmp_path):
  write_shards(tmp_path, checkpoint(), extra_index={"ghost": "a.safetensors"})
  with pytest.raises(UserError, match=r"a\.safetensors lacks key ghost"):
    load_params(tmp_path, abstract(), TABLE)


def test_duplicate_key_across_shards(tmp_path):
  write_shards(tmp_path, checkpoint())
  first = load_file(tmp_path / "a.safetensors")
  second = load_file(tmp_path / "b.safetensors")
  save_file(second | {"conv.weight": first["conv.weight"]}, tmp_path / "b.safetensors")
  with pytest.raises(UserError, match=r"holds key conv\.weight again"):
    load_params(tmp_path, abstract(), TABLE)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_broken_index(tmp_path, text):
  write_shards(tmp_path, checkpoint()).write_text(text)
  with pytest.raises(UserError, match=r"index\.json"):
    load_params(tmp_path, abstract(), TABLE)


def test_read_config(tmp_path):
  with pytest.raises(UserError, match=r"config\.json cannot be read"):
    read_config(tmp_path)
  with pytest.raises(UserError, match="not a directory"):
    read_config(tmp_path / "nowhere")
  (tmp_path / "config.json").write_text("[1]")
  with pytest.raises(UserError, match="JSON object"):
    read_config(tmp_path)
  (tmp_path / "config.json").write_text('{"_class_name": "X"}')
  assert read_config(tmp_path) == {"_class_name": "X"}
