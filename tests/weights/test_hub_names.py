"""Names of the hub's repositories in place of directories and files, wherever one is wanted."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from rtdmd_jax import cli, export
from rtdmd_jax.adapters.load import Lora, load_adapters
from rtdmd_jax.config import load_config
from rtdmd_jax.errors import UserError
from rtdmd_jax.models import build_transformer
from rtdmd_jax.pipeline import Pipeline
from rtdmd_jax.pipeline.describe import describe_pipeline
from rtdmd_jax.rewards import device_rewards, make
from rtdmd_jax.training.describe import role_bases
from rtdmd_jax.training.setup import load_bases
from rtdmd_jax.weights import reward_files
from rtdmd_jax.weights.published import PUBLISHED, read
from rtdmd_jax.weights.safetensors import read_config
from tests.support import hub_cache
from tests.support.paths import CONFIGS, TINY

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
  hub_cache.use(monkeypatch, tmp_path)
  return tmp_path


def equal(one, other):
  return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_a_pipeline_and_the_bases_of_its_roles(machine):
  copy = hub_cache.copy(machine, "org/tiny", TINY)
  overrides = ["model.pretrained=org/tiny", "model.teacher_init=org/tiny@main"]
  model = load_config(
    str(CONFIGS / "tiny_stage1.py"), [*overrides, f"model.generator_init=org/tiny/{WEIGHTS}"]
  ).model
  pipeline = Pipeline.from_pretrained(model.pretrained)
  described = describe_pipeline(model.pretrained)
  own, keys = role_bases(model, described)
  bases = load_bases(described, (own, *keys.values()), pipeline.params)
  # The copy's transformer, under whatever name, is loaded once; a file of it is another base.
  assert keys["teacher"] == keys["fake_score"] == str(copy / "transformer")
  assert keys["generator"] == str(copy / WEIGHTS) and len(bases) == 2
  assert equal(bases[keys["generator"]], pipeline.params)
  with pytest.raises(UserError, match="org/none is not on this machine"):
    Pipeline.from_pretrained("org/none")


def test_adapters(machine):
  transformer = build_transformer(read_config(TINY / "transformer"))
  adapter = TINY / "stage1/generator"
  hub_cache.copy(machine, "org/lora", adapter)
  file = adapter / "pytorch_lora_weights.safetensors"
  hub_cache.cache(machine, "org/files", {"some/lora.safetensors": file})
  expected = load_adapters([Lora(adapter, 0.5)], transformer)
  for name in ("org/lora:0.5", "org/lora@main:0.5", {"path": "org/lora", "scale": 0.5}):
    assert equal(load_adapters([Lora.parse(name)], transformer), expected)
  own = load_adapters([Lora(file)], transformer)
  assert equal(load_adapters([Lora.parse("org/files/some/lora.safetensors")], transformer), own)
  with pytest.raises(UserError, match=r'hf download org/gone --include "adapter_config.json"'):
    load_adapters([Lora.parse("org/gone")], transformer)


def test_rewards(machine):
  hub_cache.copy(machine, "org/clip", TINY / "clip")
  here, there = (
    device_rewards.load("clipscore", {"directory": d}) for d in (TINY / "clip", "org/clip")
  )
  assert equal(here.params, there.params)
  options = {"directory": "org/gone", "weights": "org/gone/head.pth", "dtype": "bfloat16"}
  with pytest.raises(
    UserError, match="reward 'aesthetic' cannot be built: .*`hf download org/gone"
  ):
    make({"aesthetic": 1.0}, options={"aesthetic": options})
  with pytest.raises(device_rewards.OptionError, match="size"):  # before anything is looked for
    device_rewards.load("clipscore", {"directory": "org/gone", "size": 1})
  with pytest.raises(UserError, match=r'--include "model\*.safetensors" --exclude "\*/\*"'):
    reward_files.local_options("geneval", {"detector": "mask2former", "clip": "org/gone"})
  mine = {"directory": "org/gone", "url": "http://127.0.0.1:9"}
  assert reward_files.local_options("pkg.mod:Mine", mine) == mine


def test_export(machine, capsys):
  hub_cache.cache(
    machine, "org/base", {"transformer/config.json": TINY / "transformer/config.json"}
  )

  def run(kind, base):
    flags = [f"--pipeline={base}", f"--lora={TINY / 'stage1/generator'}", f"--format={kind}"]
    argv = ["export", *flags, f"--out={kind}"]
    needs = ("pipeline", "format", "out")
    return cli.run(export.main, argv, define_flags=export.define_flags, requires=needs)

  assert run("peft", "org/base") == 0
  assert "# LoRA for org/base" in Path("peft/README.md").read_text()
  assert 'from_pretrained("org/base")' in Path("peft/README.md").read_text()
  capsys.readouterr()
  assert run("merged", "org/base") == 2  # here the base's weights are wanted, too
  err = capsys.readouterr().err
  assert "org/base is not on this machine" in err and '--include "transformer/*.safetensors"' in err
  hub_cache.cache(machine, "org/whole", {n: TINY / n for n in ("transformer/config.json", WEIGHTS)})
  assert run("merged", "org/whole") == 0
  assert (
    load_file("merged/diffusion_pytorch_model.safetensors").keys()
    == load_file(TINY / WEIGHTS).keys()
  )


def test_config_files_for_shapes(machine):
  name = "stabilityai/stable-diffusion-3.5-medium"
  assert read(name, "transformer") is PUBLISHED["stable-diffusion-3.5-medium"]["transformer"]
  assert read(f"{name}@v1", "vae") is PUBLISHED["stable-diffusion-3.5-medium"]["vae"]
  hub_cache.cache(machine, name, {"transformer/config.json": '{"num_layers": 3}'})
  assert read(name, "transformer") == {"num_layers": 3}
  assert read(name, "vae") is PUBLISHED["stable-diffusion-3.5-medium"]["vae"]
  Path("checkpoints/stable-diffusion-3.5-medium/transformer").mkdir(parents=True)
  with pytest.raises(UserError, match="checkpoints/.*/transformer/config.json cannot be read"):
    read(name, "transformer")
