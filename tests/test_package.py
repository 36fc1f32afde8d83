"""The package as a whole: what it needs, what it offers, and the commands that its pages print."""

import ast
import importlib
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict
from packaging.specifiers import SpecifierSet

from rtdmd_jax.config import load_config
from rtdmd_jax.evaluate import suite
from rtdmd_jax.sample import Settings
from rtdmd_jax.training.typed_config import dmd_config, optimizer_config, policy_config
from tests.support.console import rtdmd
from tests.support.paths import ROOT

CONFIGS = sorted(
  p
  for p in (ROOT / "configs").glob("*.py")
  if p.name not in ("common.py", "families.py", "gpus.py")
)
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "launch").glob("*.sh")])
# Distributions whose module has another name.
DISTRIBUTIONS = {"PIL": "pillow", "absl": "absl-py", "orbax": "orbax-checkpoint"}

# Calls that programs around this package make; further parameters must be optional.
SIGNATURES = {
  "rtdmd_jax.algo.schedules": [
    "sd3_sigmas(steps, *, shift=3.0)",
    "flux1_sigmas(steps, *, image_tokens)",
    "flux2_sigmas(steps, *, image_tokens)",
  ],
  "rtdmd_jax.algo.transitions": [
    "cps_mean(x, v, sigma, next_sigma, eta)",
    "cps_step(x, v, sigma, next_sigma, eta, noise)",
    "cps_log_prob(next_x, mean)",
    "sde_step(x, v, sigma, next_sigma, noise_level, noise, *, sigma_max)",
    "sde_log_prob(next_x, x, v, sigma, next_sigma, noise_level, *, sigma_max)",
    "renoise(x_s, noise, sigma_s, sigma_t)",
    "ambient_target(x_s, noise, sigma_s, sigma_t, *, scale_out)",
  ],
  "rtdmd_jax.algo.losses": [
    "dmd_loss(x, x_fake, x_real, *, normalize=True)",
    "inverse_scale_weight(scale, low, high)",
    "fake_score_loss(v, target, scale, *, weight_low=0.0, weight_high=10.0)",
    "consistency_loss(anchor, first, second)",
    "clipped_policy_loss(log_prob, old_log_prob, advantage, *, clip_low, clip_high, limit)",
    "kl_to_reference(mean, mean_ref, std)",
    "reward_hinge(reward, margin)",
    "generator_loss(x_s, sigma_s, sigma_t, noise, transition_noise, teacher_velocity,"
    " fake_velocity, *, eta, normalize=True)",
    "ambient_fake_score_loss(fake_velocity, x_s, sigma_s, sigma_t, noise, *, scale_out=True,"
    " weight_low=0.0, weight_high=10.0, consistency_weight=0.0, steps_back=None,"
    " transition_noise=None, eta=0.9, two_sample=True, stop_transitions=True)",
  ],
  "rtdmd_jax.algo.rollout": [
    "generator_rollout(velocity, noise, sigmas, step_noise, *, eta, stop)",
  ],
  "rtdmd_jax.algo.advantages": [
    "group_advantages(rewards, prompt_ids, weights, *, per_prompt=True, global_std=True,"
    " weight_advantages=True)",
  ],
  "rtdmd_jax.models": ["load_transformer(directory, *, dtype=float)"],
  "rtdmd_jax.pipeline": [
    "Pipeline.from_pretrained(directory, *, dtype=float, mesh=None)",
    "Pipeline.encode(self, prompts)",
    "Pipeline.velocity(self, params, latents, sigma, conditioning, *, guidance=None)",
    "Pipeline.decode(self, latents)",
    "Pipeline.sample(self, prompts, key, *, image_size)",
  ],
  "rtdmd_jax.rewards": ["make(names_and_weights, *, options=None)"],
}


def _signature(text):
  """`name(a, *, b=1)` as its name and an `inspect.Signature`."""
  name, _, parameters = text.removesuffix(")").partition("(")
  return name, inspect.signature(eval(f"lambda {parameters}: None"))


@pytest.mark.parametrize("module", SIGNATURES)
def test_public_names_have_their_signatures(module):
  for text in SIGNATURES[module]:
    name, wanted = _signature(text)
    found = importlib.import_module(module)
    for part in name.split("."):
      found = getattr(found, part)
    parameters = dict(inspect.signature(found).parameters)
    for parameter in wanted.parameters.values():
      mine = parameters.pop(parameter.name)
      assert mine.kind == parameter.kind, text
      if parameter.default is not float:  # `float` stands for "has some default"
        assert mine.default == parameter.default, text
      else:
        assert mine.default is not inspect.Parameter.empty, text
    for extra in parameters.values():
      assert extra.default is not inspect.Parameter.empty, text
    positional = [p.name for p in wanted.parameters.values() if p.kind != p.KEYWORD_ONLY]
    assert list(inspect.signature(found).parameters)[: len(positional)] == positional, text


# Hides what the core install does not have, then imports every module.
IMPORT_EVERYTHING = """
import importlib.util, pkgutil, sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
  @classmethod
  def find_spec(cls, name, path=None, target=None):
    if name.partition(".")[0] in ("torch", "tensorflow", "diffusers", "peft"):
      return None
    return super().find_spec(name, path, target)

sys.meta_path = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
assert importlib.util.find_spec("torch") is None
import rtdmd_jax
for module in pkgutil.walk_packages(rtdmd_jax.__path__, "rtdmd_jax."):
  importlib.import_module(module.name)
  print(module.name)
"""


def test_every_module_imports_without_torch_and_tensorflow():
  command = [sys.executable, "-c", IMPORT_EVERYTHING]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  assert {"rtdmd_jax.train", "rtdmd_jax.adapters.peft"} <= set(done.stdout.split())


def _requirements():
  """Each line of requirements.txt without its comment, as (name, range)."""
  lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").open())
  return [re.match(r"([\w.-]+)(.*)", line).groups() for line in lines if line]


def test_the_lock_file_has_a_version_with_hashes_in_every_range():
  locked = (ROOT / "requirements.lock").read_text()
  entry = r"^([\w.-]+)==(\S+)(?: ; [^\\]*)? \\\n    --hash=sha256:[0-9a-f]{64}"
  entries = re.findall(entry, locked, re.M)
  assert len(entries) == len(re.findall(r"^[\w.-]+==", locked, re.M)) > 50
  for name, rest in _requirements():
    pinned = [version for key, version in entries if key == name.lower().replace("_", "-")]
    assert pinned, name
    assert all(version in SpecifierSet(rest) for version in pinned), (name, rest, pinned)


def test_requirements_are_ranges_from_a_tested_version():
  for name, rest in _requirements():
    assert re.match(r">=[\d.]+(,<[\d.]+)?$", rest), (name, rest)


def test_every_package_is_installed_and_the_configurations_with_it():
  setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
  folders = {path.parent for path in (ROOT / "rtdmd_jax").rglob("*.py")}
  found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
  assert set(setuptools["packages"]) == found | {"rtdmd_jax.configs"}
  assert setuptools["package-dir"] == {"rtdmd_jax.configs": "configs"}


@pytest.mark.slow
def test_a_wheel_works_outside_of_the_clone(tmp_path):
  """Configurations, the shipped pipeline and the command are in it."""
  build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", f"--outdir={tmp_path}"]
  source = tmp_path / "source"
  for name in ("rtdmd_jax", "configs"):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  subprocess.run([*build, source], check=True, capture_output=True)
  (wheel,) = tmp_path.glob("*.whl")
  with zipfile.ZipFile(wheel) as archive:
    assert "rtdmd_jax/py.typed" in archive.namelist()
    archive.extractall(tmp_path / "site")
  (tmp_path / "empty").mkdir()
  where = {"cwd": tmp_path / "empty", "path": tmp_path / "site"}
  assert "train" in rtdmd("--help", **where).stdout
  checked = rtdmd("check", "--config=rtdmd_jax:tiny_stage2", **where)
  assert checked.stdout.splitlines()[-1] == "no problem found", checked
  drawn = rtdmd(
    "sample", "--config=rtdmd_jax:tiny_infer", "--prompt=a photo of a red circle", "--seeds=1",
    "--workdir=out", **where,
  )  # fmt: skip
  assert drawn.returncode == 0 and len(list((tmp_path / "empty/out").glob("*.png"))) == 1, drawn


_OPTIONAL = ("ocr", "judges", "studio")


def _extras():
  """Distributions that the optional installs of what runs (not of what tests) add."""
  extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  extras = extras["optional-dependencies"]
  return {re.match(r"[\w.-]+", line)[0] for name in _OPTIONAL for line in extras[name]}


def test_requirements_cover_every_import():
  core = {name.lower().replace("_", "-") for name, _ in _requirements()}
  for file in sorted((ROOT / "rtdmd_jax").rglob("*.py")):
    for node in ast.walk(ast.parse(file.read_text())):
      # Inside functions also what an extra brings.
      listed = core | (_extras() if getattr(node, "col_offset", 0) else set())
      names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      if isinstance(node, ast.ImportFrom) and not node.level:
        names = [node.module]
      for top in {name.partition(".")[0] for name in names}:
        if top == "rtdmd_jax" or top in sys.stdlib_module_names:
          continue
        assert DISTRIBUTIONS.get(top, top).replace("_", "-").lower() in listed, f"{file}: {top}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads(path):
  config = load_config(str(path))
  assert isinstance(config, ConfigDict) and config.is_locked
  if path.stem.endswith("_infer"):
    Settings.from_config(config)
    return
  if path.stem.endswith("_eval"):
    suite.check_config(config)
    for name in config.systems:
      suite.settings(config, name)
    return
  assert config.stage in ("pretrain", "stage1", "stage2")
  if config.stage != "pretrain":
    # The typed forms take every key of their sections and no other.
    dmd_config(config, SimpleNamespace(schedule=SimpleNamespace(shift=3.0)))
    for section in (config.generator, config.fake_score):
      optimizer_config(section)
  if config.stage == "stage2":
    policy_config(config)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_the_pages_name_what_exists(page):
  text = page.read_text().replace("\\\n", " ")
  for line in text.splitlines():
    for module in re.findall(r"-m (rtdmd_jax[\w.]*)", line):
      assert importlib.util.find_spec(module), line
    for config in re.findall(r"--config=([\w./:]+)", line):
      config = config if config.startswith("rtdmd_jax:") else str(ROOT / config)
      load_config(config, re.findall(r"--config\.(\S+=\S+)", line))
  if page.suffix == ".md":
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
      assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_files_that_the_architecture_page_names_exist():
  text = (ROOT / "docs/architecture.md").read_text()
  for name in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
    assert (ROOT / "rtdmd_jax" / name).exists() or (ROOT / name).exists(), name
