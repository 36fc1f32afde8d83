import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from rtdmd_jax import cli, sample
from rtdmd_jax.config import load_config
from tests.support.paths import ROOT
from tests.support.xla_flags import xla_flags

CONFIG = ROOT / "configs/tiny_infer.py"
PROMPTS = ["a photo of a red circle", "a photo of two blue squares", "a photo of a green cross"]


def run(workdir, *flags, prompts=PROMPTS):
  argv = ["sample", f"--config={CONFIG}", f"--workdir={workdir}", *flags]
  argv += [f"--prompt={prompt}" for prompt in prompts]
  return cli.run(sample.main, argv, define_flags=sample.define_flags, requires=("config",))


def pixels(path):
  return np.asarray(Image.open(path)).astype(int)


def assert_same_image(one, two):
  # Another batch size may sum in another order, which moves a few values to the next byte.
  difference = np.abs(pixels(one) - pixels(two))
  assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.slow
def test_images_are_functions_of_prompt_number_and_seed(tmp_path, capsys):
  assert run(tmp_path / "a", "--seeds=7,8", "--config.batch=4", "--grid") == 0
  names = [f"{i:05d}_{seed}.png" for i in range(3) for seed in (7, 8)]
  assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [*names, "grid.png"]
  assert len({pixels(tmp_path / "a" / name).tobytes() for name in names}) == 6
  assert pixels(tmp_path / "a" / names[0]).shape == (64, 64, 3)
  assert run(tmp_path / "b", "--seeds=8", "--config.batch=1") == 0
  for i in range(3):
    assert_same_image(tmp_path / "a" / f"{i:05d}_8.png", tmp_path / "b" / f"{i:05d}_8.png")
  # The settings are in the file, and a second run finds nothing to do.
  image = Image.open(tmp_path / "a" / names[1])
  notes = json.loads(image.text["rtdmd_jax"])
  assert (notes["prompt"], notes["prompt_index"], notes["seed"]) == (PROMPTS[0], 0, 8)
  assert (notes["steps"], notes["eta"], notes["loras"][0]["scale"]) == (4, 0.9, 1.0)
  assert b"tEXtrtdmd_jax" in (tmp_path / "a" / names[1]).read_bytes()
  capsys.readouterr()
  assert run(tmp_path / "a", "--seeds=7,8", "--config.batch=2") == 0
  assert "0 images drawn, 6 were there" in capsys.readouterr().out
  # Other settings are refused, and drawn where asked for.
  assert run(tmp_path / "a", "--seeds=7", "--config.steps=2") == 2
  assert "has other settings" in capsys.readouterr().err
  before = pixels(tmp_path / "a" / names[0])
  assert run(tmp_path / "a", "--seeds=7", "--config.steps=2", "--overwrite") == 0
  assert (pixels(tmp_path / "a" / names[0]) != before).any()


@pytest.mark.slow
def test_base_with_guidance_and_a_narrow_image(tmp_path):
  file = tmp_path / "prompts.txt"
  file.write_text("\n".join(PROMPTS[:2]))
  flags = ["--config.few_step=false", "--config.steps=3", "--config.width=32", f"--prompts={file}"]
  images = []
  for guidance in ("1.0", "4.0"):
    out = tmp_path / guidance
    assert run(out, *flags, f"--config.guidance={guidance}", "--lora=", prompts=[]) == 0
    images.append(pixels(out / "00001_42.png"))
  assert images[0].shape == (64, 32, 3) and (images[0] != images[1]).mean() > 0.1


@pytest.mark.slow
def test_the_number_of_devices_changes_nothing(tmp_path):
  assert run(tmp_path / "one", "--config.batch=3") == 0
  code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from rtdmd_jax import cli, sample\n"
  code += "import jax; assert jax.device_count() == 2\n"
  code += "sys.exit(cli.run(sample.main, sys.argv, define_flags=sample.define_flags))"
  argv = [f"--config={CONFIG}", f"--workdir={tmp_path / 'two'}", "--config.batch=3"]
  argv += [f"--prompt={prompt}" for prompt in PROMPTS]
  environment = dict(os.environ, XLA_FLAGS=xla_flags(2))
  subprocess.run([sys.executable, "-c", code, *argv], env=environment, check=True)
  for i in range(3):
    assert_same_image(tmp_path / "one" / f"{i:05d}_42.png", tmp_path / "two" / f"{i:05d}_42.png")


@pytest.mark.slow
def test_images_that_are_not_finite_are_errors(tmp_path, capsys):
  pipeline = shutil.copytree(ROOT / "rtdmd_jax/assets/tiny", tmp_path / "pipeline")
  file = pipeline / "vae/diffusion_pytorch_model.safetensors"
  weights = load_file(file)
  weights["decoder.conv_out.bias"][:] = np.inf  # which clamping would make white
  save_file(weights, file, {"format": "pt"})
  out = tmp_path / "out"
  assert run(out, f"--config.pipeline={pipeline}", "--config.batch=4", "--seeds=7,8") == 2
  err = capsys.readouterr().err
  assert f"the image of prompt 0 ({PROMPTS[0]!r}) with seed 7, 0 (" in err and "and 1 more" in err
  assert "not finite" in err and err.count("\n") == 1 and not list(out.glob("*"))


@pytest.mark.parametrize(
  "flags, prompts, message",
  [
    ([], [], "no prompts: give --prompt"),
    ([], [" "], "a --prompt is empty"),
    (["--prompts=nowhere.txt"], [], "nowhere.txt does not exist"),
    (["--seeds=1,x"], PROMPTS, "--seeds=1,x must be whole numbers"),
    (["--seeds=1,1"], PROMPTS, "give different numbers"),
    (["--config.steps=0"], PROMPTS, "steps is 0"),
    (["--config.guidance=0.5"], PROMPTS, "guidance is 0.5"),
    (["--config.dtype=int8"], PROMPTS, "dtype is 'int8'"),
    (["--config.eta=2"], PROMPTS, "eta is 2.0"),
    (["--config.pipeline=nowhere"], PROMPTS, "nowhere is not a directory"),
    (["--config.hieght=64"], PROMPTS, "did you mean height"),
    (["--config.width=128"], PROMPTS, "sides of at most 64 pixels"),
    (["--config.width=60"], PROMPTS, "image_size is (64, 60); use a multiple of 16"),
  ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, flags, prompts, message):
  assert run(tmp_path / "out", *flags, prompts=prompts) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ") and message in err and err.count("\n") == 1
  assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("change", [{"extra": 1}, {"seed": None}])
def test_config_keys_are_strict(change):
  config = load_config(str(CONFIG)).to_dict() | change
  if change.get("seed", 0) is None:
    del config["seed"]
  with pytest.raises(sample.UserError, match="'extra'|lacks the key 'seed'"):
    sample.Settings.from_config(config)


def test_a_strange_file_in_the_way_is_not_replaced(tmp_path):
  settings = sample.Settings.from_config(load_config(str(CONFIG)))
  shot = sample.Shot(0, "x", 1)
  Image.new("RGB", (4, 4)).save(shot.path(tmp_path))
  with pytest.raises(sample.UserError, match=r"00000_1\.png has other settings"):
    sample.pending([shot], settings, tmp_path, overwrite=False)
  assert sample.pending([shot], settings, tmp_path, overwrite=True) == [shot]
