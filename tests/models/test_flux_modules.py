"""Both FLUX transformers without a reference: stacks, adapters, shapes and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.adapters.lora import build_adapters
from rtdmd_jax.errors import UserError
from rtdmd_jax.models import build_transformer
from rtdmd_jax.models.flux1 import Flux1Config
from rtdmd_jax.models.flux2 import Flux2Config
from rtdmd_jax.models.packing import pack, unpack
from rtdmd_jax.models.rotary import rotary_table, rotate_halves, rotate_pairs
from rtdmd_jax.runtime import sharding

SHARED = {
  "num_layers": 2,
  "num_single_layers": 3,
  "attention_head_dim": 12,
  "num_attention_heads": 2,
  "joint_attention_dim": 10,
}
FLUX1 = SHARED | {
  "_class_name": "FluxTransformer2DModel",
  "in_channels": 16,
  "pooled_projection_dim": 6,
  "guidance_embeds": True,
  "axes_dims_rope": [4, 4, 4],
}
FLUX2 = SHARED | {
  "_class_name": "Flux2Transformer2DModel",
  "in_channels": 8,
  "mlp_ratio": 2.0,
  "guidance_embeds": False,
  "axes_dims_rope": [2, 2, 4, 4],
}
# Every kind of dense layer that a recipe may adapt, by PEFT's suffix rule.
TARGETS = {
  Flux1Config: ["to_q", "add_q_proj", "to_add_out", "attn.to_out.0", "ff.net.0.proj"]
  + ["ff_context.net.2", "proj_mlp", "proj_out", "norm1.linear", "x_embedder"],
  Flux2Config: ["to_q", "add_k_proj", "attn.to_out", "attn.to_out.0", "to_add_out"]
  + ["to_qkv_mlp_proj", "ff.linear_in", "ff_context.linear_out", "context_embedder"]
  + ["single_stream_modulation.linear"],
}
BOTH = pytest.mark.parametrize("config", [FLUX1, FLUX2], ids=["flux1", "flux2"])


def random_like(tree, seed=0, scale=0.3):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: jnp.asarray(scale * rng.standard_normal(s.shape), jnp.float32), tree
  )


def inputs(config):
  rng = np.random.default_rng(1)
  first = config is FLUX1
  shapes = [(2, 4, 6, 4) if first else (2, 2, 3, 8), (2, 5, 10), (2, 6)]
  latents, tokens, pooled = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)
  sigma = jnp.array([0.75, 0.2])
  return (latents, sigma, tokens, pooled, 5 * sigma) if first else (latents, sigma, tokens)


@BOTH
def test_example_is_the_smallest_valid_input(config):
  transformer = build_transformer(config)
  params = transformer.init_abstract()
  out = jax.eval_shape(transformer.velocity, params, *transformer.example)
  assert out.shape == transformer.example[0].shape and out.dtype == jnp.float32


@pytest.mark.slow
@BOTH
def test_fresh_network_predicts_zero(config):
  transformer = build_transformer(config)
  out = jax.jit(transformer.velocity)(transformer.init(jax.random.key(0)), *inputs(config))
  assert not out.any()


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("scan, remat", [(False, "none"), (True, "full"), (True, "dots")])
def test_scan_and_remat_change_nothing(config, scan, remat):
  transformer, other = build_transformer(config), build_transformer(config, scan=scan, remat=remat)
  params = random_like(transformer.init_abstract())
  lora = random_adapters(transformer, params)

  def loss(t, x, lora):
    return jnp.square(t.apply({"params": params, "lora": lora}, x, *inputs(config)[1:])).mean()

  def run(t):
    return jax.jit(jax.value_and_grad(lambda *args: loss(t, *args), (0, 1)))(x, lora)

  x = inputs(config)[0]
  want, got = run(transformer), run(other)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert jnp.abs(a - b).max() <= 1e-4 * jnp.abs(b).max()
  assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(want))


@BOTH
def test_scan_is_one_loop_per_kind_of_block(config):
  transformer = build_transformer(config)
  lowered = jax.jit(transformer.velocity).lower(transformer.init_abstract(), *inputs(config))
  assert lowered.as_text().count("stablehlo.while") == 2


@pytest.mark.slow
@BOTH
def test_adapters_equal_merged_kernels(config):
  transformer = build_transformer(config)
  params = random_like(transformer.init_abstract())
  lora = random_adapters(transformer, params)
  merged = jax.tree_util.tree_map_with_path(lambda p, x: add_product(p, x, lora), params)
  apply = jax.jit(transformer.apply)
  plain, want = (apply({"params": p}, *inputs(config)) for p in (params, merged))
  assert jnp.abs(want - plain).max() > 1e-2
  for collection in ("lora_frozen", "lora"):
    got = apply({"params": params, collection: lora}, *inputs(config))
    np.testing.assert_allclose(got, want, atol=1e-4)
  empty = jax.tree_util.tree_map_with_path(lambda p, x: x * 0 if p[-1].key == "b" else x, lora)
  np.testing.assert_array_equal(apply({"params": params, "lora": empty}, *inputs(config)), plain)


def random_adapters(transformer, params):
  targets = TARGETS[type(transformer.config)]
  lora = build_adapters(params, transformer.table, targets, rank=2, key=jax.random.key(0))
  return random_like(lora, seed=2, scale=0.2)


def add_product(path, leaf, adapters):
  node = adapters
  for name in path[:-1]:
    node = node.get(name.key, {})
  return leaf + node["a"] @ node["b"] if path[-1].key == "kernel" and "a" in node else leaf


def test_packing_is_a_bijection_in_the_stated_order():
  x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
  packed = pack(x)
  assert packed.shape == (2, 2, 3, 12)
  assert packed[1, 1, 2, 4 * 2 + 2 * 0 + 1] == x[1, 2, 5, 2]
  np.testing.assert_array_equal(unpack(packed), x)
  with pytest.raises(ValueError, match="even"):
    pack(x[:, 1:])


@pytest.mark.parametrize("rotate", [rotate_pairs, rotate_halves])
def test_rotary_products_depend_on_the_distance_only(rotate):
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in range(2))

  def product(i, j):
    tables = (rotary_table(np.array([[n]]), (8,), 100.0) for n in (i, j))
    return jnp.sum(rotate(q, next(tables)) * rotate(k, next(tables)))

  np.testing.assert_allclose(product(3, 1), product(9, 7), rtol=1e-4)
  assert abs(product(3, 1) - product(3, 2)) > 1e-2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pairs_turn_on_a_tpu_as_elsewhere_gradient_included(dtype, monkeypatch):
  x = jax.random.normal(jax.random.key(0), (2, 5, 3, 16)).astype(dtype)
  rotary = rotary_table(np.arange(5)[:, None], (16,), 1e4)

  def turned():
    run = lambda x: rotate_pairs(x, rotary)  # noqa: E731
    return jax.jit(run)(x), jax.jit(jax.grad(lambda x: jnp.sum(run(x).astype(jnp.float32) ** 3)))(x)

  elsewhere = turned()
  monkeypatch.setattr(sharding, "platform", lambda: "tpu")
  assert "dot_general" in str(jax.make_jaxpr(lambda x: rotate_pairs(x, rotary))(x))
  for one, other in zip(elsewhere, turned(), strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pairs_turn_as_complex_numbers(dtype):
  x = jax.random.normal(jax.random.key(0), (2, 5, 3, 16)).astype(dtype)
  cos, sin = rotary_table(np.arange(5)[:, None], (16,), 1e4)
  exact = np.asarray(x, np.float64)
  turned = (exact[..., 0::2] + 1j * exact[..., 1::2]) * (np.asarray(cos) + 1j * sin)[:, None]
  expected = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
  got = rotate_pairs(x, (cos, sin))
  assert got.dtype == dtype
  # Products and sums are float32; the result is rounded once.
  eps = {jnp.float32: 3e-7, jnp.bfloat16: 2.0**-8}[dtype]
  np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=eps, atol=1e-6)


def test_bad_inputs():
  first, second = (build_transformer(c) for c in (FLUX1, FLUX2))
  params1, params2 = first.init_abstract(), second.init_abstract()
  latents, sigma, tokens, pooled, guidance = inputs(FLUX1)
  run1 = lambda *args: jax.eval_shape(first.velocity, params1, *args)  # noqa: E731
  run2 = lambda *args: jax.eval_shape(second.velocity, params2, *args)  # noqa: E731
  for args in ((pooled, None), (None, guidance)):
    with pytest.raises(ValueError, match="pooled"):
      run1(latents, sigma, tokens, *args)
  with pytest.raises(ValueError, match="even"):
    run1(latents[:, 1:], sigma, tokens, pooled, guidance)
  with pytest.raises(ValueError, match="3 channels, expected 4"):
    run1(latents[..., 1:], sigma, tokens, pooled, guidance)
  latents, sigma, tokens = inputs(FLUX2)
  for args in ((pooled, None), (None, guidance)):
    with pytest.raises(ValueError, match="pooled"):
      run2(latents, sigma, tokens, *args)
  with pytest.raises(ValueError, match="7 channels, expected 8"):
    run2(latents[..., 1:], sigma, tokens)


@BOTH
@pytest.mark.parametrize(
  "change, message",
  [
    ({"num_heads": 3}, "num_heads"),
    ({"axes_dims_rope": [4, 4, 8]}, "axes_dims_rope"),
    ({"axes_dims_rope": [3, 3, 6]}, "even"),
    ({"axes_dims_rope": [6, 6]}, "axes_dims_rope"),
    ({"patch_size": 2}, "patch_size"),
    ({"out_channels": 64}, "out_channels"),
    ({"num_single_layers": 0}, "num_single_layers"),
  ],
)
def test_bad_configs(config, change, message):
  with pytest.raises(UserError, match=message):
    build_transformer(config | change)


def test_packed_channels_must_divide():
  with pytest.raises(UserError, match="in_channels"):
    build_transformer(FLUX1 | {"in_channels": 18})
