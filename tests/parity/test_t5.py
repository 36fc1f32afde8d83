"""T5's encoder against transformers in float32; 1e-4 leaves room for the order of summation."""

import jax
import numpy as np
import pytest

from rtdmd_jax.models import t5
from rtdmd_jax.models.encoders import load_t5
from rtdmd_jax.weights.safetensors import save_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
TOLERANCE = 1e-4

# The heads together are wider than the model, as d_kv allows.
CONFIG = dict(
  vocab_size=60,
  d_model=32,
  d_kv=12,
  d_ff=72,
  num_layers=3,
  num_heads=4,
  relative_attention_num_buckets=16,
  relative_attention_max_distance=24,
)


def _reference(cls="T5EncoderModel", **changes):
  torch.manual_seed(0)
  model = getattr(transformers, cls)(transformers.T5Config(**CONFIG | changes)).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.ndim == 1))
  return model


@pytest.mark.parametrize("feed_forward", ["gated-gelu", "relu"])
@pytest.mark.parametrize("masked", [False, True])
def test_output_equals_transformers(tmp_path, feed_forward, masked):
  model = _reference(feed_forward_proj=feed_forward)
  model.save_pretrained(tmp_path)
  module, params = load_t5(tmp_path)
  ids = np.random.default_rng(0).integers(1, 60, (3, 40))
  mask = np.ones((3, 40), bool)
  if masked:
    ids[0, 9:], mask[0, 9:] = 0, False
    ids[1, 25:], mask[1, 25:] = 0, False
  with torch.no_grad():
    want = model(torch.tensor(ids), attention_mask=torch.tensor(mask).long()).last_hidden_state
  run = jax.jit(lambda p, *args: module.apply({"params": p}, *args))
  got = run(params, ids, mask) if masked else run(params, ids)
  assert want.abs().max() > 0.5
  np.testing.assert_allclose(got[mask], want.numpy()[mask], atol=TOLERANCE)


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (16, 24), (64, 300)])
def test_buckets_equal_transformers(buckets, max_distance):
  from transformers.models.t5.modeling_t5 import T5Attention

  offset = torch.arange(600)[None] - torch.arange(600)[:, None]
  want = T5Attention._relative_position_bucket(offset, True, buckets, max_distance)
  np.testing.assert_array_equal(t5.relative_buckets(600, buckets, max_distance), want)


def test_the_encoder_of_a_full_t5(tmp_path):
  full = _reference("T5ForConditionalGeneration", feed_forward_proj="gated-gelu")
  full.save_pretrained(tmp_path)
  module, params = load_t5(tmp_path)
  ids = np.random.default_rng(0).integers(1, 60, (2, 7))
  with torch.no_grad():
    want = full.encoder(torch.tensor(ids)).last_hidden_state.numpy()
  np.testing.assert_allclose(module.apply({"params": params}, ids), want, atol=TOLERANCE)


@pytest.mark.parametrize("feed_forward", ["gated-gelu", "relu"])
def test_written_weights_load_in_transformers(tmp_path, feed_forward):
  model = _reference(feed_forward_proj=feed_forward)
  model.save_pretrained(tmp_path)
  _, params = load_t5(tmp_path)
  save_params(tmp_path / "model.safetensors", params, t5.TABLE)
  again, info = transformers.T5EncoderModel.from_pretrained(tmp_path, output_loading_info=True)
  assert not any(info.values())
  want, got = model.state_dict(), again.state_dict()
  assert got.keys() == want.keys()
  for key in want:
    assert torch.equal(got[key], want[key]), key
