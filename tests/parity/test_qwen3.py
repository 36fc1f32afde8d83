"""Qwen3 against transformers in float32; 1e-4 leaves room for the order of summation only."""

import jax
import numpy as np
import pytest

from rtdmd_jax.errors import UserError
from rtdmd_jax.models import qwen3
from rtdmd_jax.models.encoders import load_qwen3
from rtdmd_jax.weights.safetensors import read_config, save_params
from tests.parity import flux_reference

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
TOLERANCE = 1e-4

# The heads together are wider than the model, and three query heads share a key head.
CONFIG = dict(
  vocab_size=60,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=5,
  num_attention_heads=6,
  num_key_value_heads=2,
  head_dim=12,
  max_position_embeddings=64,
  rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
  tie_word_embeddings=True,
)


def reference(**changes):
  torch.manual_seed(0)
  model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**CONFIG | changes)).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.ndim == 1))
  return model


def padded_inputs():
  ids = np.random.default_rng(0).integers(1, 60, (3, 20))
  mask = np.ones((3, 20), bool)
  ids[0, 7:], mask[0, 7:] = 0, False
  ids[1, 15:], mask[1, 15:] = 0, False
  return ids, mask


def klein_embeddings(model, ids, mask, layers):
  """What diffusers' Flux2KleinPipeline makes of the encoder's output."""
  with torch.no_grad():
    output = model(
      input_ids=torch.tensor(ids),
      attention_mask=torch.tensor(mask).long(),
      output_hidden_states=True,
      use_cache=False,
    )
  states = torch.stack([output.hidden_states[k] for k in layers], dim=1)
  b, n, length, width = states.shape
  return states.permute(0, 2, 1, 3).reshape(b, length, n * width).numpy()


@pytest.mark.slow
@pytest.mark.parametrize(
  "layers, changes",
  [((1, 2, 4), {}), ((2, 5), {"tie_word_embeddings": False}), ((0, 3), {"attention_bias": True})],
  ids=["middle", "last", "embedding"],
)
def test_states_equal_transformers_at_hidden_tokens_too(tmp_path, layers, changes):
  model = reference(**changes)
  model.save_pretrained(tmp_path)
  module, params = load_qwen3(tmp_path, layers=layers)
  ids, mask = padded_inputs()
  want = klein_embeddings(model, ids, mask, layers)
  got = jax.jit(lambda p, *args: module.apply({"params": p}, *args))(params, ids, mask)
  assert np.abs(want).max() > 1
  np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=TOLERANCE)


def test_without_a_mask_padding_takes_part(tmp_path):
  model = reference()
  model.save_pretrained(tmp_path)
  module, params = load_qwen3(tmp_path, layers=(2,))
  ids, mask = padded_inputs()
  run = jax.jit(lambda p, *args: module.apply({"params": p}, *args))
  got = run(params, ids)
  want = klein_embeddings(model, ids, np.ones_like(mask), (2,))
  np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=TOLERANCE)
  assert np.abs(got - run(params, ids, mask))[~mask].max() > 0.1


def test_layers_after_the_last_state_are_not_loaded(tmp_path):
  reference().save_pretrained(tmp_path)
  _, params = load_qwen3(tmp_path, layers=(1, 3))
  assert params.keys() == {"embed_tokens", "layers_0", "layers_1"}
  assert params["layers_1"]["self_attn"]["k_proj"]["kernel"].shape == (2, 32, 24)


def test_older_configs_name_theta_at_the_top(tmp_path):
  reference().save_pretrained(tmp_path)
  new = read_config(tmp_path)
  old = {k: v for k, v in new.items() if k != "rope_parameters"}
  old |= {"rope_theta": 1e6, "rope_scaling": None}
  assert qwen3.Qwen3Config.from_dict(old) == qwen3.Qwen3Config.from_dict(new)


def test_written_weights_load_in_transformers(tmp_path):
  model = reference(tie_word_embeddings=True)
  model.save_pretrained(tmp_path)
  _, params = load_qwen3(tmp_path, layers=(2, 5))
  save_params(tmp_path / "model.safetensors", params, qwen3.key_table((2, 5)))
  again, info = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
  assert not any(info.values())
  flux_reference.assert_same_weights(again, model)


@pytest.mark.parametrize(
  "change, message",
  [({"model_type": "qwen2"}, "qwen2"), ({"use_sliding_window": True}, "use_sliding_window")]
  + [({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "yarn")],
)
def test_bad_configs(tmp_path, change, message):
  reference().save_pretrained(tmp_path)
  with pytest.raises(UserError, match=message):
    qwen3.Qwen3Config.from_dict(read_config(tmp_path) | change)


@pytest.mark.parametrize("layers", [(), (3, 2), (6,), (-1,)])
def test_bad_layers(tmp_path, layers):
  reference().save_pretrained(tmp_path)
  with pytest.raises(UserError, match="hidden states"):
    load_qwen3(tmp_path, layers=layers)
