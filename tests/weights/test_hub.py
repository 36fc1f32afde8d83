"""Names of models to places, over a cache of Hugging Face's hub that is laid out by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from rtdmd_jax.errors import UserError
from rtdmd_jax.weights import downloads, hub
from rtdmd_jax.weights.hub import Repository, find, find_file, local_path
from rtdmd_jax.weights.hub_files import patterns
from tests.support import hub_cache
from tests.support.hub_cache import COMMIT, OTHER, cache
from tests.support.paths import ROOT

SD35 = "stabilityai/stable-diffusion-3.5-medium"
PIPELINE = {
  "_class_name": "StableDiffusion3Pipeline",
  "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
  "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
  "image_encoder": [None, None],
  "tokenizer": ["transformers", "CLIPTokenizer"],
  "transformer": ["diffusers", "SD3Transformer2DModel"],
  "vae": ["diffusers", "AutoencoderKL"],
}
INDEX = {
  "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
}
WHOLE = {
  "model_index.json": json.dumps(PIPELINE),
  "scheduler/scheduler_config.json": "{}",
  "text_encoder/config.json": "{}",
  "text_encoder/model.safetensors.index.json": json.dumps(INDEX),
  "text_encoder/model-00001-of-00002.safetensors": "",
  "text_encoder/model-00002-of-00002.safetensors": "",
  "tokenizer/tokenizer_config.json": "{}",
  "transformer/config.json": "{}",
  "transformer/diffusion_pytorch_model.safetensors": "",
  "vae/config.json": "{}",
  "vae/diffusion_pytorch_model.safetensors": "",
}


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
  hub_cache.use(monkeypatch, tmp_path)
  return tmp_path


@pytest.mark.parametrize(
  "name, expected",
  [
    ("org/name", ("org/name", None, None)),
    ("black-forest-labs/FLUX.1-dev", ("black-forest-labs/FLUX.1-dev", None, None)),
    ("org/name@v1.0", ("org/name", "v1.0", None)),
    ("org/name@refs/pr/3", ("org/name", "refs/pr/3", None)),
    ("org/name/a/b.safetensors", ("org/name", None, "a/b.safetensors")),
    ("org/name@abc/b+c.pt", ("org/name", "abc", "b+c.pt")),
    ("name", None),
    ("/org/name", None),
    ("./org/name", None),
    ("../name", None),
    ("org/file.safetensors", None),
    ("runs/sd35_stage1/export/generator", None),
    ("runs/export", None),
    ("org/name/folder/inside", None),
    ("mine/name", None),
  ],
)
def test_names(name, expected):
  Path("mine").mkdir()
  assert Repository.parse(name) == expected


def test_the_order_of_places(machine):
  cached = cache(machine, SD35, WHOLE)
  assert local_path(SD35) == cached
  for place in ("checkpoints/stabilityai", "checkpoints", "stabilityai"):
    folder = Path(place) / "stable-diffusion-3.5-medium"
    folder.mkdir(parents=True)
    assert local_path(SD35) == folder
  # A folder does not tell its revision.
  assert local_path(f"{SD35}@main") == cached


def test_files_of_repositories(machine):
  name = "zai-org/ImageReward/ImageReward.pt"
  cached = cache(machine, "zai-org/ImageReward", {"ImageReward.pt": "", "med_config.json": "{}"})
  assert local_path(name) == cached / "ImageReward.pt"
  assert (local_path(name).parent / "med_config.json").is_file()
  for place in (
    "zai-org/ImageReward/ImageReward.pt",
    "ImageReward/ImageReward.pt",
    "ImageReward.pt",
  ):
    file = hub.CHECKPOINTS / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    assert local_path(name) == file


def test_revisions(machine):
  cache(machine, "org/name", {"f.json": "1"})
  older = cache(machine, "org/name", {"f.json": "0"}, OTHER, "v0")
  assert local_path("org/name/f.json").read_text() == "1"
  assert local_path("org/name@v0/f.json") == older / "f.json"
  assert local_path(f"org/name@{OTHER}/f.json").read_text() == "0"
  with pytest.raises(UserError, match=r"org/name@v2/f.json is not .* --revision=v2 --include"):
    local_path("org/name@v2/f.json")


@pytest.mark.parametrize("missing", sorted(WHOLE))
def test_a_copy_that_is_not_whole_is_none(machine, missing):
  cache(machine, SD35, {name: text for name, text in WHOLE.items() if name != missing})
  assert find(SD35) is None
  ours = missing.startswith("transformer/")
  assert (find(SD35, "transformer") is None) == ours
  file = find_file(SD35, "transformer/config.json")
  assert (file is None) == (missing == "transformer/config.json")


def test_copies_of_other_kinds(machine):
  clip = "openai/clip-vit-large-patch14"
  cache(machine, clip, {"config.json": "{}", "model.fp16.safetensors": "", "vocab.json": "{}"})
  for kind in ("model", "encoder", "processor", "tokenizer"):
    assert find(clip, kind) is None
  found = cache(machine, "org/lora", {"pytorch_lora_weights.safetensors": ""})
  assert find("org/lora", "adapter") == found
  laion = {"tokenizer_config.json": "{}", "preprocessor_config.json": "{}", "config.json": "{}"}
  found = cache(machine, "laion/clip", laion)
  assert {find("laion/clip", kind) for kind in ("processor", "config", "tokenizer")} == {found}
  assert find("laion/clip", "encoder") is None


def test_what_is_absent_is_one_sentence_with_the_command():
  with pytest.raises(UserError) as caught:
    local_path(SD35)
  sentence = str(caught.value)
  assert sentence.startswith(f"{SD35} is not on this machine (HF_HUB_OFFLINE is set); fetch it")
  for part in (
    f'`hf download {SD35} --include "*.json"',
    '--include "*/model*.safetensors"',
    '--exclude "*fp16*"`',
    "29 files, about 16.3 GB; licence: Stability AI Community License",
    f"gated: first accept the terms at https://huggingface.co/{SD35} and run `hf auth login`",
    "or put it into checkpoints/stable-diffusion-3.5-medium",
  ):
    assert part in sentence
  with pytest.raises(UserError, match="2 files, about 4.9 GB"):
    local_path(SD35, "transformer", download=False)
  with pytest.raises(UserError, match="org/name is not .*its size and licence are on https"):
    local_path("org/name")
  with pytest.raises(UserError, match=r"write xswu/HPSv2/FILE"):
    local_path("xswu/HPSv2", "file")


def test_what_is_not_on_the_hub_has_a_command_too(monkeypatch):
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # and yet nothing is asked
  repository = "christophschuhmann/improved-aesthetic-predictor"
  with pytest.raises(UserError) as caught:
    local_path(f"{repository}/sac+logos+ava1-l14-linearMSE.pth", "file")
  assert "curl -fL --create-dirs -o checkpoints/sac+logos+ava1-l14-linearMSE.pth" in str(
    caught.value
  )
  assert f"https://github.com/{repository}/raw/main/sac%2Blogos%2Bava1-l14" in str(caught.value)
  assert "1 file, about 4 MB; licence: Apache-2.0" in str(caught.value)


@pytest.mark.parametrize(
  "path, command",
  [
    ("checkpoints/FLUX.1-dev", "--local-dir=checkpoints/FLUX.1-dev`"),
    ("/data/HPS_v2.1_compressed.pt", "hf download xswu/HPSv2 .* --local-dir=/data`"),
    ("sac+logos+ava1-l14-linearMSE.pth", "-o sac.logos.ava1-l14-linearMSE.pth https"),
  ],
)
def test_a_missing_path_with_a_published_name_says_where_it_is_from(path, command):
  with pytest.raises(UserError, match=rf"does not exist; fetch it with `.*{command}"):
    local_path(path)


def test_other_paths_stay_as_they_are():
  for name in ("nowhere", "/no/where", "runs/x/export/generator", "org/file.safetensors"):
    assert local_path(name) == Path(name)
  Path("mine").mkdir()
  assert local_path("mine", "adapter") == Path("mine")
  assert local_path("mine/gone") == Path("mine/gone")


def test_a_download_takes_what_is_read_and_nothing_else(machine, monkeypatch, capsys):
  listed = [
    *WHOLE, "sd3.5_medium.safetensors", "text_encoders/t5xxl_fp16.safetensors", "README.md",
    "text_encoder/model.fp16.safetensors", "tokenizer/merges.txt", "tokenizer/spiece.model",
    "text_encoder/model.safetensors.index.fp16.json", "tokenizer/chat_template.jinja",
    "transformer/model.onnx", "vae/diffusion_pytorch_model.bin", "text_encoders/clip_g.safetensors",
  ]  # fmt: skip
  read = [
    *WHOLE,
    *(f"tokenizer/{n}" for n in ("merges.txt", "spiece.model", "chat_template.jinja")),
  ]
  asked = []

  def download(repository, *, revision, allow_patterns, ignore_patterns=None, **options):
    if options.get("local_files_only"):
      raise errors.LocalEntryNotFoundError("not here")
    asked.append((repository, revision))
    taken = huggingface_hub.utils.filter_repo_objects(
      listed, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
    )
    commit = COMMIT if revision == "main" else OTHER
    return str(cache(machine, repository, {name: WHOLE.get(name, "") for name in taken}, commit))

  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  folder = local_path(f"{SD35}@main")
  assert (
    asked == [(SD35, "main")] and f"downloading {SD35}@main (29 files" in capsys.readouterr().err
  )
  found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_symlink()}
  assert found == set(read)
  listed.remove("vae/config.json")
  with pytest.raises(UserError, match="has no vae/config.json on Hugging Face's hub"):
    local_path(f"{SD35}@other")


def _http(kind, status):
  import httpx2

  request = httpx2.Request("GET", "https://huggingface.co/api")
  return kind("refused", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(
  "error, message",
  [
    (lambda: _http(errors.GatedRepoError, 403), "terms are not accepted .* gated: first accept"),
    (lambda: _http(errors.RepositoryNotFoundError, 404), "has no such repository"),
    (lambda: _http(errors.RevisionNotFoundError, 404), "has no revision v9"),
    (lambda: ConnectionError("no route"), r"ConnectionError: no route\); fetch it with `hf down"),
  ],
)
def test_a_download_that_fails_is_one_sentence(monkeypatch, error, message):
  def download(*args, local_files_only=False, **kwargs):
    raise errors.LocalEntryNotFoundError("not here") if local_files_only else error()

  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  with pytest.raises(UserError, match=message):
    local_path("org/name@v9")


def test_the_environment_of_the_hub_counts(machine):
  """HF_HOME and HF_HUB_OFFLINE as a user sets them."""
  found = cache(machine, "org/name", {"f.json": "1"})
  code = "from rtdmd_jax.weights.hub import local_path; print(local_path('org/name/f.json'))"
  root = str(ROOT)
  env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
  env |= {"HF_HOME": str(machine), "HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
  done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
  assert done.stdout.strip() == str(found / "f.json"), done.stderr


def test_what_describes_a_file_is_fetched_with_it():
  def taken(file, names):
    take, leave = patterns(file, "file")
    return set(
      huggingface_hub.utils.filter_repo_objects(names, allow_patterns=take, ignore_patterns=leave)
    )

  beside = ["x/adapter_config.json", "x/transformer/adapter_config.json"]
  assert taken("x/g.pt", [*beside, "x/g.pt", "x/h.pt", "y/adapter_config.json"]) == {
    "x/g.pt",
    *beside,
  }
  assert taken("I.pt", ["I.pt", "med_config.json", "J.pt"]) == {"I.pt", "med_config.json"}


def test_titles(machine):
  (machine / "here/mine").mkdir()
  assert hub.title("mine") == hub.title(machine / "here/mine") == "mine"
  assert hub.title(f"{SD35}@v1") == SD35
  assert hub.base_name(f"nowhere/{SD35}@v1") == "stable-diffusion-3.5-medium"
  assert downloads.known_id("x/PickScore_v1") == "yuvalkirstain/PickScore_v1"
