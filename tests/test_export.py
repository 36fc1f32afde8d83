import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from rtdmd_jax import export
from rtdmd_jax.adapters.load import Lora, load_adapters
from rtdmd_jax.adapters.lora import equal_ranks, fold_scale, stack_adapters
from rtdmd_jax.adapters.peft import save_peft
from rtdmd_jax.models import build_transformer
from rtdmd_jax.weights.safetensors import load_params, save_model
from tests.support import toy
from tests.support.exported import ALPHA, CONFIG, RANK, drawn, run


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  """A pipeline directory's transformer with bfloat16 weights, and two adapters on disk."""
  root = tmp_path_factory.mktemp("case")
  transformer = build_transformer(CONFIG)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), transformer.init(jax.random.key(0)))
  file = root / "pipeline/transformer/diffusion_pytorch_model.safetensors"
  save_model(file, CONFIG, params, transformer.table)
  chosen = {"one": ["attn.to_q", "attn.to_add_out"], "two": ["attn.to_q", "proj_out"]}
  for seed, (name, targets) in enumerate(chosen.items()):
    adapters = drawn(transformer, targets, seed=seed)
    save_peft(root / name, adapters, transformer.table, rank=RANK, alpha=ALPHA, targets=targets)
  return root, transformer, params


def expected_deltas(root, transformer, scale=0.5):
  """`one + scale * two`, by checkpoint module, as [out, in]."""
  sums = {}
  for name, strength in (("one", 1.0), ("two", scale)):
    for key, a in load_file(root / name / "adapter_model.safetensors").items():
      if ".lora_A." in key:
        b = load_file(root / name / "adapter_model.safetensors")[key.replace("lora_A", "lora_B")]
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        sums[module] = sums.get(module, 0.0) + strength * (ALPHA / RANK) * (b @ a)
  return sums


def test_merged_weights_are_the_base_plus_every_adapter(case, tmp_path, capsys):
  root, transformer, _ = case
  out = tmp_path / "merged"
  flags = (f"--lora={root / 'one'}", f"--lora={root / 'two'}:0.5", "--format=merged")
  assert run(root, *flags, f"--out={out}") == 0
  assert "diffusion_pytorch_model.safetensors" in capsys.readouterr().out
  card = (out / "README.md").read_text()
  assert "# Merged transformer for pipeline" in card and "SD3Transformer2DModel" in card
  assert json.loads((out / "config.json").read_text()) == CONFIG
  base = load_file(root / "pipeline/transformer/diffusion_pytorch_model.safetensors")
  merged = load_file(out / "diffusion_pytorch_model.safetensors")
  deltas = expected_deltas(root, transformer)
  assert base.keys() == merged.keys() and len(deltas) == 6
  for key, weight in base.items():
    assert merged[key].dtype == weight.dtype
    delta = deltas.get(key.removesuffix(".weight"))
    if delta is None or not key.endswith(".weight"):
      np.testing.assert_array_equal(merged[key], weight)
    else:
      want = weight.astype(np.float32) + delta
      assert np.abs(delta).max() > 0.1
      np.testing.assert_allclose(merged[key].astype(np.float32), want, rtol=2**-8, atol=1e-6)


def test_merged_shards_and_type(case, tmp_path):
  root, transformer, _ = case
  adapters = load_adapters([Lora.parse(str(root / "one"))], transformer)
  source = root / "pipeline/transformer"
  export.export_merged(
    source, transformer, adapters, tmp_path, dtype=jnp.float32, shard_bytes=10_000
  )
  index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
  shards = sorted(p.name for p in tmp_path.glob("*-of-*.safetensors"))
  assert len(shards) > 2 and set(index["weight_map"].values()) == set(shards)
  sizes = [sum(t.nbytes for t in load_file(tmp_path / s).values()) for s in shards]
  assert index["metadata"]["total_size"] == sum(sizes) and max(sizes) <= 10_000
  # Strict: nothing missing, nothing twice.
  got = load_params(tmp_path, transformer.init_abstract(), transformer.table)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("kind", ["peft", "comfyui"])
def test_an_exported_stack_reads_back_as_the_same_change(case, tmp_path, kind):
  root, transformer, _ = case
  out = tmp_path / "out"
  flags = (f"--lora={root / 'one'}", f"--lora={root / 'two'}:0.5", f"--format={kind}")
  assert run(root, *flags, f"--out={out}") == 0
  path = out / export.COMFYUI_NAME if kind == "comfyui" else out
  flat = flatten_dict(load_adapters([Lora(path)], transformer))
  layers = {p[:-1]: np.asarray(flat[p] @ flat[(*p[:-1], "b")]) for p in flat if p[-1] == "a"}
  table, got = transformer.table, {}
  for module, delta in layers.items():
    stacked = delta.ndim == 3
    names = table.modules(module, len(delta) if stacked else None)
    got |= zip(names, delta if stacked else [delta], strict=True)
  want = expected_deltas(root, transformer)
  assert got.keys() == want.keys()
  for module in want:
    np.testing.assert_allclose(got[module], want[module].T, atol=1e-5, err_msg=module)


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--format=peft"], "--lora is required"),
    (["--lora=x", "--format=zip"], "choose one of peft, comfyui, merged"),
    (["--lora=nowhere", "--format=peft"], "lora nowhere does not exist"),
    (["--lora=x", "--format=peft", "--dtype=float32"], "--dtype applies to --format=merged only"),
    (["--lora={one}", "--format=merged", "--dtype=int8"], "--dtype=int8 is unknown"),
    (["--lora=x", "--format=peft", "--pipeline=nowhere"], "nowhere is not a directory"),
    (["--lora=x", "--format=peft", "--pipeline="], "--pipeline is required with --lora"),
    (["--lora=x", "--format=peft", "--role=fake_score"], "goes with --checkpoint"),
    (["--lora=x", "--checkpoint=y", "--format=peft"], "in its place --checkpoint"),
  ],
)
def test_mistakes_are_one_sentence(case, tmp_path, capsys, flags, message):
  root, _, _ = case
  flags = [flag.format(one=root / "one") for flag in flags]
  assert run(root, *flags, f"--out={tmp_path / 'out'}") == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ") and message in err and err.count("\n") == 1
  assert not (tmp_path / "out").exists()


def test_a_directory_with_files_is_not_overwritten(case, tmp_path, capsys):
  root, _, _ = case
  (tmp_path / "mine").write_text("x")
  assert run(root, f"--lora={root / 'one'}", "--format=peft", f"--out={tmp_path}") == 2
  assert "not an empty directory" in capsys.readouterr().err


def test_stacked_adapters_add_what_both_add():
  one, two = {"layer": toy.adapters(1)}, {"layer": toy.adapters(2)}
  both = stack_adapters(one, two)["layer"]
  assert both["a"].shape == (3, 2 * toy.RANK)
  delta = sum(tree["layer"]["a"] @ tree["layer"]["b"] for tree in (one, two))
  np.testing.assert_allclose(both["a"] @ both["b"], delta, atol=1e-6)


def test_one_side_may_be_empty():
  tree = {"layer": toy.adapters(1)}
  jax.tree.map(np.testing.assert_array_equal, stack_adapters({}, tree), tree)
  jax.tree.map(np.testing.assert_array_equal, stack_adapters(tree, {}), tree)


def test_different_modules_keep_their_ranks_until_they_are_made_equal():
  one, two = {"one": toy.adapters(1)}, {"two": toy.adapters(2)}
  both = stack_adapters(stack_adapters(one, two), two)
  filled, rank = equal_ranks(both)
  assert rank == 2 * toy.RANK
  assert all(tree["a"].shape == (3, rank) for tree in filled.values())
  for name, tree in both.items():
    filled_delta = filled[name]["a"] @ filled[name]["b"]
    np.testing.assert_allclose(filled_delta, tree["a"] @ tree["b"], atol=1e-6)


def test_a_lora_is_a_path_with_a_scale():
  assert Lora.parse("a/b") == Lora.parse({"path": "a/b"}) == Lora.parse("a/b:1")
  assert str(Lora.parse("C:/b").path) == "C:/b"
  assert Lora.parse({"path": "a", "scale": 2}).scale == 2.0


@pytest.mark.parametrize(
  "value",
  [
    {"scale": 1.0},
    {"path": "a", "alpha": 1},
    {"path": "a", "scale": "x"},
    {"path": "a", "scale": float("inf")},
    "a:nan",
    "a:-inf",
    "a:1e999",
  ],
)
def test_a_broken_lora_entry_is_named(value):
  with pytest.raises(export.UserError, match="lora"):
    Lora.parse(value)


def test_scales_fold_in_order(case):
  root, transformer, _ = case
  (one,) = [load_adapters([Lora(root / "one", 3.0)], transformer)]
  plain = fold_scale(load_adapters([Lora(root / "one")], transformer), 3.0 * RANK)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), one, plain)
  assert load_adapters([], transformer) == {}
