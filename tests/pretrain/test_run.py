import numpy as np
import pytest
from safetensors.numpy import load_file

from rtdmd_jax.config import load_config
from rtdmd_jax.errors import UserError
from rtdmd_jax.pretrain import run as pretraining
from tests.support.paths import CONFIGS, TINY


def _weights(pipeline, part):
  files = list((pipeline / part).glob("*.safetensors"))
  assert len(files) == 1
  return load_file(files[0])


def test_tokenizers_that_exist_stay(tmp_path):
  captions = ["a photo of a red circle", "a photo of two crosses"]
  first = pretraining._tokenize(captions, tmp_path, 12)
  # Another set of captions would give another vocabulary.
  again = pretraining._tokenize(captions + ["a photo of a blue square"], tmp_path, 12)
  assert first[2] == again[2]
  for before, after in zip(first[:2], again[:2], strict=True):
    np.testing.assert_array_equal(before[:2], after[:2])


def test_a_start_without_a_pipeline_is_one_sentence(tmp_path):
  config = load_config(str(CONFIGS / "tiny_pretrain_mixed.py"), [f"start={tmp_path / 'nowhere'}"])
  with pytest.raises(UserError, match="nowhere, which holds no pipeline"):
    pretraining.run(config, tmp_path / "run")


@pytest.mark.slow
def test_goes_on_from_a_pipeline(tmp_path):
  settings = ["images=12", "vae.steps=2", "vae.batch_size=4", "teacher.steps=2"]
  settings += ["teacher.batch_size=4", f"start={TINY}"]
  pipeline = pretraining.run(
    load_config(str(CONFIGS / "tiny_pretrain_mixed.py"), settings), tmp_path
  )
  before, after = _weights(TINY, "vae"), _weights(pipeline, "vae")
  assert before.keys() == after.keys()
  changed = {key for key in before if not np.array_equal(before[key], after[key])}
  assert changed and all(key.startswith("decoder.") for key in changed)
  for part in ("transformer", "text_encoder_3"):
    before, after = _weights(TINY, part), _weights(pipeline, part)
    assert any(not np.array_equal(before[key], after[key]) for key in before)
    # Two updates of the warm-up: near where it began, not a fresh start.
    for key, value in before.items():
      np.testing.assert_allclose(after[key], value, atol=0.05, err_msg=f"{part} {key}")
  for part in pretraining.TOKENIZERS:
    assert (pipeline / part / "tokenizer.json").read_bytes() == (
      TINY / part / "tokenizer.json"
    ).read_bytes()
  for part in ("clip", "text_encoder", "text_encoder_2"):
    before, after = _weights(TINY, part), _weights(pipeline, part)
    assert all(np.array_equal(before[key], after[key]) for key in before)
