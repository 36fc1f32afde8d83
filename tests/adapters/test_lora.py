import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from rtdmd_jax.adapters import lora
from rtdmd_jax.errors import UserError
from rtdmd_jax.models.layers import Dense, adapted_product
from rtdmd_jax.weights.key_table import KeyTable, Stack

TABLE = KeyTable(
  stacks=[Stack("blocks_0", "transformer_blocks")],
  renames=[(r"^last_block\b", "transformer_blocks.3"), (r"\bto_out_0$", "to_out.0")],
)
KEY = jax.random.key(0)


def dense(n_in, n_out, *stack):
  return {
    "kernel": jax.ShapeDtypeStruct((*stack, n_in, n_out), jnp.bfloat16),
    "bias": jax.ShapeDtypeStruct((*stack, n_out), jnp.bfloat16),
  }


ABSTRACT = {
  "blocks_0": {
    "attn": {"to_q": dense(6, 8, 3), "to_out_0": dense(8, 6, 3)},
    "attn2": {"to_q": dense(6, 8, 3)},
  },
  "last_block": {"attn": {"to_q": dense(6, 8)}},
  "proj": {"kernel": jax.ShapeDtypeStruct((2, 2, 4, 6), jnp.float32)},
}


def build(targets=("attn.to_q", "attn.to_out.0"), **options):
  return lora.build_adapters(ABSTRACT, TABLE, targets, **({"rank": 2, "key": KEY} | options))


def test_tree_mirrors_the_matching_modules():
  shapes = {path: x.shape for path, x in flatten_dict(build()).items()}
  assert shapes == {
    ("blocks_0", "attn", "to_q", "a"): (3, 6, 2),
    ("blocks_0", "attn", "to_q", "b"): (3, 2, 8),
    ("blocks_0", "attn", "to_out_0", "a"): (3, 8, 2),
    ("blocks_0", "attn", "to_out_0", "b"): (3, 2, 6),
    ("last_block", "attn", "to_q", "a"): (6, 2),
    ("last_block", "attn", "to_q", "b"): (2, 8),
  }


def test_explicit_layer_names():
  every = [f"transformer_blocks.{i}.attn2.to_q" for i in range(3)]
  assert list(flatten_dict(build(every))) == [
    ("blocks_0", "attn2", "to_q", "a"),
    ("blocks_0", "attn2", "to_q", "b"),
  ]
  with pytest.raises(UserError, match=r"transformer_blocks\.2\.attn2\.to_q"):
    build(every[:2])


@pytest.mark.parametrize(("init", "std"), [("gaussian", 1 / 64), ("normal", 1.0), ("rsqrt", 0.125)])
def test_initial_values(init, std):
  abstract = {"fc": dense(500, 20)}
  leaf = lora.build_adapters(abstract, TABLE, ["fc"], rank=64, key=KEY, init=init)["fc"]
  assert leaf["a"].dtype == jnp.float32 and not np.any(leaf["b"])
  assert float(leaf["a"].std()) == pytest.approx(std, rel=0.03)


def test_adapters_in_bfloat16_are_the_float32_ones_rounded():
  half = flatten_dict(build(dtype=jnp.bfloat16))
  for path, full in flatten_dict(build()).items():
    assert half[path].dtype == jnp.bfloat16
    np.testing.assert_array_equal(half[path], full.astype(jnp.bfloat16))


def test_a_layer_draws_the_same_whatever_else_is_adapted():
  alone, together = build(["attn2.to_q"]), build(["attn2.to_q", "attn.to_q"])
  a, b = (tree["blocks_0"]["attn2"]["to_q"]["a"] for tree in (alone, together))
  np.testing.assert_array_equal(a, b)
  assert not np.any(b == together["blocks_0"]["attn"]["to_q"]["a"])
  assert not np.any(b[0] == b[1])


def test_user_errors_name_the_value():
  with pytest.raises(UserError, match=r"'attn.to_qq'.*attn\.to_q"):
    build(["attn.to_qq"])
  with pytest.raises(UserError, match="'tn.to_q'"):
    build(["tn.to_q"])
  with pytest.raises(UserError, match="'proj'"):
    build(["proj"])  # a convolution
  with pytest.raises(UserError, match="rank is 0"):
    build(rank=0)
  with pytest.raises(UserError, match="targets is empty"):
    build([])
  with pytest.raises(UserError, match="'kaiming'"):
    build(init="kaiming")


def random_case(dtype):
  keys = jax.random.split(KEY, 4)
  params = {
    "fc": {
      "kernel": jax.random.normal(keys[0], (3, 6, 8)).astype(dtype),
      "bias": jnp.ones((3, 8), dtype),
    }
  }
  a, b = jax.random.normal(keys[1], (3, 6, 2)), jax.random.normal(keys[2], (3, 2, 8))
  return params, {"fc": {"a": a, "b": b}}, jax.random.normal(keys[3], (5, 6))


@pytest.mark.parametrize("layer", range(3))
def test_merge_equals_the_branch(layer):
  params, adapters, x = random_case(jnp.float32)
  trees = params, lora.fold_scale(adapters, 5.0), lora.merge(params, adapters, alpha=5.0)
  plain, folded, merged = (jax.tree.map(lambda leaf: leaf[layer], t["fc"]) for t in trees)
  with_branch = Dense(8).apply({"params": plain, "lora": folded}, x)
  np.testing.assert_allclose(Dense(8).apply({"params": merged}, x), with_branch, atol=1e-4)
  assert np.abs(with_branch - Dense(8).apply({"params": plain}, x)).max() > 0.1


def test_a_folded_adapter_has_the_gradients_of_a_branch():
  keys = jax.random.split(KEY, 5)
  shapes = (4, 5, 6), (6, 8), (6, 2), (2, 8)
  arguments = [jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=False)]
  cotangent = jax.random.normal(keys[4], (4, 5, 8))
  folded, pullback = jax.vjp(adapted_product, *arguments)
  branch, expected = jax.vjp(lambda x, w, a, b: x @ w + (x @ a) @ b, *arguments)
  np.testing.assert_allclose(folded, branch, atol=1e-5)
  for ours, theirs in zip(pullback(cotangent), expected(cotangent), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_merge_rounds_once():
  params, adapters, _ = random_case(jnp.bfloat16)
  merged = lora.merge(params, adapters, alpha=1.0)["fc"]
  assert merged["bias"] is params["fc"]["bias"] and merged["kernel"].dtype == jnp.bfloat16
  exact = np.asarray(params["fc"]["kernel"], np.float64) + 0.5 * np.einsum(
    "lir,lro->lio", *(np.asarray(adapters["fc"][k], np.float64) for k in "ab")
  )
  np.testing.assert_array_equal(merged["kernel"], exact.astype(np.float32).astype(jnp.bfloat16))


def test_merge_names_a_stray_adapter():
  params, adapters, _ = random_case(jnp.float32)
  with pytest.raises(ValueError, match=r"adapter ff"):
    lora.merge(params, {"ff": adapters["fc"]}, alpha=1.0)
  with pytest.raises(ValueError, match=r"\(2, 6, 8\)"):
    lora.merge(params, jax.tree.map(lambda x: x[:2], adapters), alpha=1.0)
