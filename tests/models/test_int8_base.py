"""Dense layers over int8 kernels: values, gradients, memory of the backward pass, and the error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.adapters.lora import build_adapters, merge
from rtdmd_jax.errors import UserError
from rtdmd_jax.models import build_transformer, layers
from rtdmd_jax.weights.int8 import quantise
from rtdmd_jax.weights.safetensors import load_params, save_params
from tests.support.programs import float_results

# Three double and five single blocks, so that no activation has the shape of a stack.
FLUX2 = {
  "_class_name": "Flux2Transformer2DModel",
  "num_layers": 3,
  "num_single_layers": 5,
  "attention_head_dim": 16,
  "num_attention_heads": 4,
  "joint_attention_dim": 24,
  "in_channels": 8,
  "mlp_ratio": 2.0,
  "guidance_embeds": False,
  "axes_dims_rope": [4, 4, 4, 4],
}


def test_a_dense_layer_is_the_product_with_the_dequantised_kernel():
  rng = np.random.default_rng(0)
  x, weights, bias = (rng.standard_normal(s).astype(np.float32) for s in ((5, 64), (64, 32), 32))
  values, scale = quantise(weights)
  dense = layers.Dense(32)

  def apply(params, x):
    return dense.apply({"params": params}, x)

  stored = {"kernel": values, "kernel_scale": scale, "bias": bias}
  plain = {"kernel": values * scale, "bias": bias}
  for got, want in (
    (apply(stored, x), apply(plain, x)),
    (jax.grad(lambda x: jnp.sum(apply(stored, x) ** 2))(x),
     jax.grad(lambda x: jnp.sum(apply(plain, x) ** 2))(x)),
  ):  # fmt: skip
    np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())


@pytest.fixture(scope="module")
def flux2(tmp_path_factory):
  """(transformer, float32 parameters, the same as int8) of small random weights."""
  transformer = build_transformer(FLUX2)
  rng = np.random.default_rng(0)
  shapes = transformer.init_abstract()
  params = jax.tree.map(
    lambda s: jnp.asarray(rng.standard_normal(s.shape) / s.shape[-2:][0] ** 0.5, jnp.float32),
    shapes,
  )
  file = tmp_path_factory.mktemp("flux2") / "model.safetensors"
  save_params(file, params, transformer.table)
  small = load_params(file, transformer.stored(shapes, "int8"), transformer.table)
  return transformer, params, small


def inputs():
  rng = np.random.default_rng(1)
  latents, tokens = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in
                     ((2, 2, 3, 8), (2, 7, 24)))  # fmt: skip
  return latents, jnp.array([0.75, 0.2]), tokens


def loss(adapters, params, transformer):
  v = transformer.apply({"params": params, "lora": adapters}, *inputs())
  return jnp.mean(v**2)


def adapters_of(transformer):
  targets = ["to_q", "attn.to_out", "to_qkv_mlp_proj"]
  shapes, key = transformer.init_abstract(), jax.random.key(0)
  adapters = build_adapters(shapes, transformer.table, targets, rank=2, key=key)
  return jax.tree.map(lambda a: a + 0.1, adapters)


@pytest.mark.slow
def test_velocity_and_adapter_gradients_are_close_to_those_of_float32(flux2):
  transformer, params, small = flux2
  adapters = adapters_of(transformer)
  run = jax.jit(jax.value_and_grad(lambda a, p: loss(a, p, transformer)))
  (value, grads), (value8, grads8) = run(adapters, params), run(adapters, small)
  assert value != value8 and abs(value8 / value - 1) < 0.03
  assert jax.tree.structure(grads8) == jax.tree.structure(adapters)
  norms = [
    np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(tree)))
    for tree in (grads, jax.tree.map(jnp.subtract, grads8, grads))
  ]
  assert 0 < norms[1] < 0.05 * norms[0]


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_no_stack_is_kept_as_floats_for_the_backward_pass(flux2, remat, monkeypatch):
  _, _, small = flux2
  transformer = build_transformer(FLUX2, remat=remat)
  stacks = {a.shape for a in jax.tree.leaves(small) if a.dtype == jnp.int8 and a.ndim == 3}
  assert len(stacks) >= 5
  adapters = adapters_of(transformer)

  def found():
    jaxpr = jax.make_jaxpr(jax.grad(lambda a, p: loss(a, p, transformer)))(adapters, small)
    return float_results(jaxpr, stacks)

  assert not found()
  if remat == "none":
    # The plain product keeps what it converted: the check above sees it.
    monkeypatch.setattr(layers, "int8_product", lambda x, v, s: (x @ v.astype(x.dtype)) * s)
    assert found() == stacks


def test_a_quantised_base_is_not_merged(flux2):
  transformer, _, small = flux2
  with pytest.raises(ValueError, match="no floating-point kernel"):
    merge(small, adapters_of(transformer), 1.0)


def test_storages_that_do_not_work():
  with pytest.raises(UserError, match="base_storage is 'int4'; choose one of native, int8"):
    build_transformer(FLUX2).stored({}, "int4")
  with pytest.raises(UserError, match="'int8' and model.dtype is 'float16'"):
    build_transformer(FLUX2, dtype=jnp.float16).stored({}, "int8")
