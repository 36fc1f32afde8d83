import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.errors import UserError
from rtdmd_jax.models import build_transformer, load_transformer
from rtdmd_jax.models.sd3 import SD3Config

CONFIG = {
  "_class_name": "SD3Transformer2DModel",
  "_diffusers_version": "0.30.0",
  "sample_size": 8,
  "patch_size": 2,
  "in_channels": 4,
  "num_layers": 5,
  "attention_head_dim": 8,
  "num_attention_heads": 2,
  "joint_attention_dim": 12,
  "caption_projection_dim": 16,
  "pooled_projection_dim": 6,
  "out_channels": 4,
  "pos_embed_max_size": 6,
  "dual_attention_layers": [0, 1],
  "qk_norm": "rms_norm",
}
# SD3 as first released; the defaults are without dual attention and normalised queries and keys.
PLAIN = {k: v for k, v in CONFIG.items() if k not in ("dual_attention_layers", "qk_norm")}
BOTH = pytest.mark.parametrize("config", [PLAIN, CONFIG], ids=["sd3", "sd35"])


def random_like(tree, seed=0, scale=0.3):
  """Random values everywhere: the fresh network is zero behind its zero gates."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: jnp.asarray(scale * rng.standard_normal(s.shape), jnp.float32), tree
  )


def inputs():
  rng = np.random.default_rng(1)
  shapes = [(2, 6, 8, 4), (2, 3, 12), (2, 6)]
  latents, tokens, pooled = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)
  return latents, jnp.array([0.75, 0.2]), tokens, pooled


def network(config):
  transformer = build_transformer(config)
  return transformer, random_like(transformer.init_abstract())


@pytest.fixture(scope="module")
def base():
  return network(CONFIG)


def lora_for(params, rank=2, seed=2):
  """Adapters on projections of joint and, if any, dual attention, in a stack and after it."""
  stack = max(name for name in params if name.startswith("blocks_"))
  kernels = [
    (stack, "attn", "to_out_0"),
    (stack, "attn", "add_k_proj"),
    ("last_block", "attn", "to_v"),
    ("blocks_0", "attn2" if "attn2" in params["blocks_0"] else "attn", "to_q"),
  ]
  tree = {}
  for path in kernels:
    node, weights = tree, params
    for name in path:
      node, weights = node.setdefault(name, {}), weights[name]
    *stack, d_in, d_out = weights["kernel"].shape
    node["a"] = jax.ShapeDtypeStruct((*stack, d_in, rank), jnp.float32)
    node["b"] = jax.ShapeDtypeStruct((*stack, rank, d_out), jnp.float32)
  return random_like(tree, seed), kernels


def test_stacks_follow_the_layers(base):
  transformer, params = base
  assert transformer.config.runs() == [(0, 2, True), (2, 2, False)]
  assert params["blocks_2"]["attn"]["to_q"]["kernel"].shape == (2, 16, 16)
  assert params["last_block"]["attn"]["to_q"]["kernel"].shape == (16, 16)
  assert transformer.table.modules(("blocks_2", "ff", "net_2"), 2) == (
    "transformer_blocks.2.ff.net.2",
    "transformer_blocks.3.ff.net.2",
  )
  assert transformer.table.modules(("last_block", "attn", "to_out_0")) == (
    "transformer_blocks.4.attn.to_out.0",
  )


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("scan, remat", [(False, "none"), (True, "full"), (False, "dots")])
def test_scan_and_remat_change_nothing(config, scan, remat):
  transformer, params = network(config)
  other = build_transformer(config, scan=scan, remat=remat)
  lora, _ = lora_for(params)

  def loss(t, lora):
    return jnp.square(t.apply({"params": params, "lora": lora}, *inputs())).mean()

  want, want_grad = jax.jit(jax.value_and_grad(lambda a: loss(transformer, a)))(lora)
  got, got_grad = jax.jit(jax.value_and_grad(lambda a: loss(other, a)))(lora)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(got_grad), jax.tree.leaves(want_grad), strict=True):
    assert jnp.abs(a - b).max() <= 1e-4 * jnp.abs(b).max()
  assert all(jnp.abs(g).max() > 1e-5 for g in jax.tree.leaves(want_grad))


@BOTH
def test_scan_is_one_loop_per_stack_and_unrolling_leaves_none(config):
  _, params = network(config)
  for scan, loops in ((True, 1 if config is PLAIN else 2), (False, 0)):
    transformer = build_transformer(config, scan=scan)
    text = jax.jit(transformer.velocity).lower(params, *inputs()).as_text()
    assert text.count("stablehlo.while") == loops


@BOTH
def test_adapters(config):
  transformer, params = network(config)
  apply = jax.jit(transformer.apply)
  lora, paths = lora_for(params)
  plain = apply({"params": params}, *inputs())

  empty = jax.tree_util.tree_map_with_path(lambda p, x: x * 0 if p[-1].key == "b" else x, lora)
  np.testing.assert_array_equal(apply({"params": params, "lora": empty}, *inputs()), plain)

  merged = jax.tree.map(lambda x: x, params)
  for path in paths:
    node, adapter = merged, lora
    for name in path:
      node, adapter = node[name], adapter[name]
    node["kernel"] = node["kernel"] + adapter["a"] @ adapter["b"]
  want = apply({"params": merged}, *inputs())
  assert jnp.abs(want - plain).max() > 1e-2
  for collection in ("lora_frozen", "lora"):
    got = apply({"params": params, collection: lora}, *inputs())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * jnp.abs(want).max())


@pytest.mark.slow
def test_the_position_table_is_not_trained(base):
  transformer, params = base
  gradient = jax.jit(jax.grad(lambda p: jnp.square(transformer.velocity(p, *inputs())).mean()))
  got = gradient(params)["pos_embed"]
  assert not got["pos_embed"].any()
  assert got["proj"]["kernel"].all()


@pytest.mark.slow
def test_fresh_network_predicts_zero(base):
  transformer, _ = base
  params = transformer.init(jax.random.key(0))
  velocity = jax.jit(transformer.velocity)(params, *inputs())
  assert velocity.shape == (2, 6, 8, 4) and velocity.dtype == jnp.float32
  assert not velocity.any()


def test_bad_inputs(base):
  transformer, params = base
  latents, sigma, tokens, pooled = inputs()
  for shape in ((2, 5, 8, 4), (2, 6, 14, 4), (2, 6, 8, 3)):
    with pytest.raises(ValueError, match="multiples of 2 up to 12, with 4 channels"):
      transformer.velocity(params, jnp.zeros(shape), sigma, tokens, pooled)
  with pytest.raises(ValueError, match="pooled"):
    transformer.velocity(params, latents, sigma, tokens)
  with pytest.raises(ValueError, match="guidance"):
    transformer.velocity(params, latents, sigma, tokens, pooled, sigma)
  with pytest.raises(UserError, match="remat"):
    build_transformer(CONFIG, remat="some").init_abstract()


@pytest.mark.parametrize(
  "change, message",
  [
    ({"_class_name": "PixArtTransformer2DModel"}, "PixArt"),
    ({"num_heads": 3}, "num_heads"),
    ({"caption_projection_dim": 17}, "caption_projection_dim"),
    ({"qk_norm": "layer_norm"}, "qk_norm"),
    ({"dual_attention_layers": [5]}, "dual_attention_layers"),
  ],
)
def test_bad_configs(change, message):
  with pytest.raises(UserError, match=message):
    build_transformer(CONFIG | change)
  with pytest.raises(UserError, match=message):
    SD3Config.from_dict(CONFIG | change)


def test_older_configs_lack_the_newer_keys():
  assert SD3Config.from_dict(PLAIN).runs() == [(0, 4, False)]
  with_null = PLAIN | {"dual_attention_layers": None, "qk_norm": None}
  assert SD3Config.from_dict(with_null) == SD3Config.from_dict(PLAIN)


def test_missing_directory(tmp_path):
  with pytest.raises(UserError, match="not a directory"):
    load_transformer(tmp_path / "transformer", dtype=jnp.float32)
