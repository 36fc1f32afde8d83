import numpy as np
import pytest
from safetensors.numpy import save_file

from rtdmd_jax.errors import UserError
from rtdmd_jax.models import build_transformer
from rtdmd_jax.weights.recognize import recognized
from rtdmd_jax.weights.safetensors import load_params

CLASSES = {
  "SD3Transformer2DModel": "an SD3 transformer",
  "FluxTransformer2DModel": "a FLUX.1 transformer",
  "Flux2Transformer2DModel": "a FLUX.2 transformer",
}


def keys(name):
  built = build_transformer({"_class_name": name})
  entries = built.table.entries(built.init_abstract())
  return built, [key for entry in entries for key in entry.keys]


@pytest.mark.parametrize("name", CLASSES)
def test_another_familys_checkpoint_is_recognized_by_its_keys(tmp_path, name):
  other = "SD3Transformer2DModel" if "Flux" in name else "FluxTransformer2DModel"
  file = tmp_path / "model.safetensors"
  save_file({key: np.zeros(1, np.float32) for key in keys(name)[1]}, file)
  built, _ = keys(other)
  with pytest.raises(UserError, match=rf"model.safetensors.* \(it looks like {CLASSES[name]}\)"):
    load_params(file, built.init_abstract(), built.table)


def test_a_checkpoint_that_only_lacks_a_key_is_not_called_another(tmp_path):
  built, names = keys("FluxTransformer2DModel")
  file = tmp_path / "model.safetensors"
  save_file({key: np.zeros(1, np.float32) for key in names[1:]}, file)
  with pytest.raises(UserError, match=f"lacks key {names[0]}.$"):
    load_params(file, built.init_abstract(), built.table)


def test_adapters_and_parts():
  assert "LoRA" in recognized(["transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight"])
  assert "autoencoder" in recognized(["decoder.conv_in.weight"])
  assert "T5" in recognized(["encoder.block.0.layer.0.SelfAttention.q.weight"])
  assert recognized(["something.weight"]) == ""
