"""Config files of a pipeline that do not fit each other; no weights are needed to find out."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rtdmd_jax.errors import UserError
from rtdmd_jax.pipeline import Pipeline
from rtdmd_jax.pipeline.describe import check_components, component_problems
from tests.support.damage import json_files
from tests.support.paths import TINY

SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
FLUX1 = {
  "model_index.json": {"_class_name": "FluxPipeline"},
  "scheduler/scheduler_config.json": SCHEDULER,
  "transformer/config.json": {"_class_name": "FluxTransformer2DModel"},
  "vae/config.json": {"_class_name": "AutoencoderKL", "latent_channels": 16},
  "text_encoder/config.json": {"architectures": ["CLIPTextModel"], "hidden_size": 768},
  "text_encoder_2/config.json": {"model_type": "t5", "d_model": 4096},
}
QWEN3 = dict(
  model_type="qwen3",
  vocab_size=100,
  hidden_size=2560,
  intermediate_size=8,
  num_hidden_layers=36,
  num_attention_heads=2,
  num_key_value_heads=1,
  head_dim=4,
  rms_norm_eps=1e-6,
  attention_bias=False,
  rope_theta=1e6,
)
FLUX2 = {
  "model_index.json": {"_class_name": "Flux2KleinPipeline"},
  "scheduler/scheduler_config.json": SCHEDULER,
  "transformer/config.json": {
    "_class_name": "Flux2Transformer2DModel",
    "joint_attention_dim": 7680,
  },
  "vae/config.json": {"_class_name": "AutoencoderKLFlux2"},
  "text_encoder/config.json": QWEN3,
}


def sd3():
  files = ["model_index.json", "scheduler/scheduler_config.json"]
  files += [f"{part}/config.json" for part in ("transformer", "vae", "text_encoder")]
  files += ["text_encoder_2/config.json", "text_encoder_3/config.json"]
  return {file: json.loads((TINY / file).read_text()) for file in files}


def write(directory, files, file=None, changes=None):
  for name, value in files.items():
    value = value | changes if name == file else value
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(json.dumps(value))
  return directory


@pytest.mark.parametrize("files", [sd3(), FLUX1, FLUX2], ids=["sd3", "flux1", "flux2"])
def test_what_fits(tmp_path, files):
  assert component_problems(write(tmp_path, files)) == []
  check_components(tmp_path)


@pytest.mark.parametrize(
  "files, file, changes, message",
  [
    (sd3(), "vae", {"latent_channels": 8}, "latent_channels of vae/config.json is 8, but in_chan"),
    (sd3(), "text_encoder", {"projection_dim": 32}, "text_encoder_2/config.json is 96, but pooled"),
    (sd3(), "text_encoder_2", {"hidden_size": 80}, "hidden_size of .* is 144, but joint_attention"),
    (sd3(), "text_encoder_3", {"d_model": 64}, "d_model of text_encoder_3/config.json is 64, but"),
    (sd3(), "text_encoder", {"architectures": ["CLIPTextModel"]}, "CLIPTextModelWithProjection is"),
    (sd3(), "text_encoder", {"architectures": 3}, 'text_encoder/config.json: "architectures" is'),
    (
      sd3(),
      "text_encoder",
      {"hidden_size": "x"},
      "text_encoder/config.json: .* hidden_size is 'x'",
    ),
    (sd3(), "transformer", {"_class_name": "X"}, "transformer/config.json: _class_name is 'X'"),
    (FLUX1, "vae", {"latent_channels": 4}, "4 x latent_channels of vae/config.json is 16, but in_"),
    (
      FLUX1,
      "text_encoder",
      {"hidden_size": 512},
      "hidden_size of .* is 512, but pooled_projection",
    ),
    (FLUX1, "text_encoder_2", {"d_model": 512}, "d_model of .* is 512, but joint_attention_dim"),
    (FLUX2, "vae", {"latent_channels": 16}, "4 x latent_channels of .* is 64, but in_channels"),
    (FLUX2, "vae", {"_class_name": "AutoencoderKL"}, "vae/config.json: _class_name is 'Autoenc"),
    (FLUX2, "text_encoder", {"hidden_size": 4096}, "3 x hidden_size of .* is 12288, but joint_att"),
    (FLUX2, "text_encoder", {"num_hidden_layers": 12}, "num_hidden_layers = 12"),
  ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, files, file, changes, message):
  write(tmp_path, files, f"{file}/config.json", changes)
  (problem,) = component_problems(tmp_path)
  assert problem.startswith(str(tmp_path))
  with pytest.raises(UserError, match=message):
    check_components(tmp_path)
  with pytest.raises(UserError, match=message):
    Pipeline.from_pretrained(tmp_path)


def test_several_problems_are_listed_together(tmp_path):
  files = sd3()
  files["vae/config.json"]["latent_channels"] = 8
  files["scheduler/scheduler_config.json"]["num_train_timesteps"] = 500
  del files["text_encoder_2/config.json"]
  del files["text_encoder_3/config.json"]
  scheduler, vae, clip, t5 = component_problems(write(tmp_path, files))
  assert f"{tmp_path}/scheduler/scheduler_config.json: num_train_timesteps = 500" in scheduler
  assert "latent_channels" in vae and "text_encoder_2 is not a directory" in clip
  assert "has no text_encoder_3" in t5 and '"text_encoder_3": [null, null]' in t5


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"_class_name": "StableDiffusionPipeline"}, "supported are StableDiffusion3Pipeline"),
    ({"scheduler": ["diffusers", "UniPCMultistepScheduler"]}, "the scheduler is 'UniPCMultistep"),
  ],
)
def test_pipelines_that_are_not_supported(tmp_path, changes, message):
  write(tmp_path, FLUX2, "model_index.json", changes)
  (problem,) = component_problems(tmp_path)
  assert problem.startswith(f"{tmp_path}/model_index.json: ") and message in problem


def test_a_pipeline_without_t5_needs_none(tmp_path):
  files = sd3()
  del files["text_encoder_3/config.json"]
  files["model_index.json"]["text_encoder_3"] = [None, None]
  assert component_problems(write(tmp_path, files)) == []
  shutil.rmtree(tmp_path / "scheduler")
  (problem,) = component_problems(tmp_path)
  assert "scheduler is not a directory" in problem


_DAMAGED = st.sampled_from([sd3(), FLUX1, FLUX2]).flatmap(
  lambda files: st.sampled_from(sorted(files)).flatmap(
    lambda name: st.tuples(st.just(files), st.just(name), json_files(files[name]))
  )
)


@settings(
  max_examples=60,
  deadline=None,
  derandomize=True,
  database=None,
  suppress_health_check=list(HealthCheck),
)
@given(_DAMAGED)
def test_damaged_config_files_are_sentences(tmp_path_factory, case):
  files, name, data = case
  directory = write(tmp_path_factory.mktemp("pipeline"), files)
  (directory / name).write_bytes(data)
  for problem in component_problems(directory):
    assert problem.startswith(str(directory)) and len(problem) < 3000
