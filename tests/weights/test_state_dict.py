import numpy as np
import pytest
from safetensors.numpy import save_file

from rtdmd_jax.errors import UserError
from rtdmd_jax.weights.open_clip import to_transformers
from rtdmd_jax.weights.state_dict import read_state_dict


def test_safetensors(tmp_path):
  want = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
  save_file(want, tmp_path / "a.safetensors")
  np.testing.assert_array_equal(
    read_state_dict(tmp_path / "a.safetensors")["a.weight"], want["a.weight"]
  )


def test_missing_and_broken_files_are_named(tmp_path):
  with pytest.raises(UserError, match="absent.pt is not a file"):
    read_state_dict(tmp_path / "absent.pt")
  (tmp_path / "cut.safetensors").write_bytes(b"1234")
  with pytest.raises(UserError, match="cut.safetensors is not a whole safetensors file"):
    read_state_dict(tmp_path / "cut.safetensors")


def test_open_clip_names():
  qkv = np.arange(12.0).reshape(6, 2)
  projection = np.arange(6.0).reshape(2, 3)
  found = to_transformers(
    {
      "visual.transformer.resblocks.3.attn.in_proj_weight": qkv,
      "transformer.resblocks.11.attn.in_proj_bias": qkv[:, 0],
      "transformer.resblocks.0.mlp.c_proj.bias": qkv[0],
      "visual.proj": projection,
      "positional_embedding": qkv,
      "logit_scale": np.float32(4),
      "attn_mask": qkv,
      "visual.transformer.resblocks.0.ls_1.gamma": qkv[1],
    }
  )
  image = "vision_model.encoder.layers.3.self_attn"
  text = "text_model.encoder.layers.11.self_attn"
  for i, name in enumerate("qkv"):
    np.testing.assert_array_equal(found.pop(f"{image}.{name}_proj.weight"), qkv[2 * i : 2 * i + 2])
    np.testing.assert_array_equal(found.pop(f"{text}.{name}_proj.bias"), qkv[2 * i : 2 * i + 2, 0])
  np.testing.assert_array_equal(found.pop("visual_projection.weight"), projection.T)
  np.testing.assert_array_equal(found.pop("text_model.encoder.layers.0.mlp.fc2.bias"), qkv[0])
  # Scaled residuals are another architecture; a strict reader reports the key as the file has it.
  assert found.keys() == {
    "text_model.embeddings.position_embedding.weight",
    "logit_scale",
    "visual.transformer.resblocks.0.ls_1.gamma",
  }
