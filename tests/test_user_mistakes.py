"""Every tool and the mistakes that can be made with it: one sentence, exit code 2, nothing done."""

import os
import runpy
import subprocess
import sys

import pytest

from rtdmd_jax.runtime import extras
from tests.support.paths import ROOT
from tests.support.tools import TOOLS

TINY = ROOT / "rtdmd_jax/assets/tiny"
CONFIGS = {
  "training": ROOT / "configs/tiny_stage2.py",
  "pretraining": ROOT / "configs/tiny_pretrain.py",
  "images": ROOT / "configs/tiny_infer.py",
  "evaluation": ROOT / "configs/tiny_eval.py",
}
# Each tool's sound command line but for where it writes, and the flag that says where.
COMMANDS = {
  "rtdmd_jax.main": ([f"--config={CONFIGS['training']}"], "--workdir"),
  "rtdmd_jax.sample": ([f"--config={CONFIGS['images']}", "--prompt=a circle"], "--workdir"),
  "rtdmd_jax.evaluate": ([f"--config={CONFIGS['evaluation']}"], "--workdir"),
  "rtdmd_jax.export": (
    [f"--pipeline={TINY}", f"--lora={TINY}/stage1/generator", "--format=peft"],
    "--out",
  ),
  "rtdmd_jax.report": ([], "--workdir"),
  "rtdmd_jax.studio": ([f"--config={CONFIGS['evaluation']}"], None),
  # No program has this name, so that a tool that goes on is quick.
  "rtdmd_jax.aot": (
    [f"--config={CONFIGS['training']}", "--topology=h100:2", "--only=none"],
    "--json",
  ),
  "rtdmd_jax.rewards.serve": (["--rewards=geneval", "--option=geneval.detector=shapes"], None),
  "rtdmd_jax.datasets.geneval": (["--count=10"], "--out"),
  "rtdmd_jax.datasets.prompt_set": ([f"--test={TINY}/prompts"], "--out"),
  "rtdmd_jax.datasets.shapes": ([], "--out"),
}
TAKES = {
  "rtdmd_jax.main": {"training", "pretraining"},
  "rtdmd_jax.sample": {"images"},
  "rtdmd_jax.evaluate": {"evaluation"},
  "rtdmd_jax.studio": {"evaluation"},
  "rtdmd_jax.aot": {"training"},
}
WRITERS = [tool for tool, (_, flag) in COMMANDS.items() if flag]
# Configuration files that are wrong by themselves, and what the sentence says of them.
_NO_KEYS = "from ml_collections import ConfigDict\nget_config = lambda: ConfigDict({'train': {}})\n"
FILES = {
  "syntax": ("def get_config(:\n", "line 1 does not load"),
  "no function": ("x = 1\n", "defines no function get_config"),
  "raises": ("def get_config():\n  return 1 / 0\n", "ZeroDivisionError"),
  "exits": ("import sys\ndef get_config():\n  sys.exit(0)\n", "SystemExit"),
  "exits at once": ("import sys\nsys.exit()\n", "SystemExit"),
  "not a config": ("get_config = dict\n", "must return a ml_collections.ConfigDict"),
  "no keys": (_NO_KEYS, "lacks the key"),
  "not text": ("\0", "does not load"),
}


@pytest.fixture
def mistake(monkeypatch, capsys, tmp_path):
  """Runs a tool as a user would; its sentence."""

  def run(tool, *argv):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [tool, *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
      runpy.run_module(tool, run_name="__main__")
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    sentence = error[error.index("error: ") :]
    assert sentence.count("\n") == 1 and "Traceback" not in error, error
    return sentence

  monkeypatch.setattr("warnings.warn", lambda *_, **__: None)  # runpy's, of modules run twice
  return run


def test_every_tool_is_here():
  assert set(COMMANDS) == set(TOOLS)


@pytest.mark.parametrize("tool", COMMANDS)
def test_a_flag_that_does_not_exist(tool, mistake):
  assert "wrkdir" in mistake(tool, *COMMANDS[tool][0], "--wrkdir=x")


@pytest.mark.parametrize("tool", COMMANDS)
def test_a_word_without_a_flag(tool, mistake, tmp_path):
  if tool == "rtdmd_jax.report":
    assert "nowhere" in mistake(tool, "nowhere")
    return
  assert "runs/x" in mistake(tool, *COMMANDS[tool][0], "runs/x")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tool", WRITERS)
@pytest.mark.parametrize("kind", ["a file", "below a file", "nowhere", "empty"])
def test_output_that_cannot_be_written(tool, kind, mistake, tmp_path):
  (tmp_path / "file").write_text("mine")
  paths = {"a file": "file", "below a file": "file/run", "nowhere": "/proc/run", "empty": ""}
  if (tool, kind) == ("rtdmd_jax.aot", "a file"):
    paths["a file"] = tmp_path  # there a file is what is written
  sentence = mistake(tool, *COMMANDS[tool][0], f"{COMMANDS[tool][1]}={paths[kind]}")
  assert str(paths[kind]) in sentence
  assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_pretraining_into_a_file(mistake, tmp_path):
  (tmp_path / "file").write_text("mine")
  config = f"--config={CONFIGS['pretraining']}"
  assert "file" in mistake("rtdmd_jax.main", config, "--workdir=file")


@pytest.mark.parametrize("tool", TAKES)
@pytest.mark.parametrize("purpose", CONFIGS)
def test_another_tools_configuration_names_that_tool(tool, purpose, mistake, tmp_path):
  if purpose in TAKES[tool]:
    return
  tools = [name for name, purposes in TAKES.items() if purpose in purposes]
  own = [word for word in COMMANDS[tool][0] if not word.startswith("--config")]
  argv = [*own, f"--config={CONFIGS[purpose]}"]
  argv += ["--workdir=run"] if COMMANDS[tool][1] == "--workdir" else []
  sentence = mistake(tool, *argv)
  assert f"python -m {tools[0]}" in sentence and CONFIGS[purpose].name in sentence
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tool", TAKES)
@pytest.mark.parametrize("kind", FILES)
def test_a_bad_configuration_file(tool, kind, mistake, tmp_path):
  if (tool, kind) == ("rtdmd_jax.aot", "no keys"):
    pytest.skip("it needs a process in which jax has not looked for devices")
  text, said = FILES[kind]
  (tmp_path / "mine.py").write_text(text)
  own = [word for word in COMMANDS[tool][0] if not word.startswith("--config")]
  argv = [*own, "--config=mine.py"]
  argv += ["--workdir=run"] if COMMANDS[tool][1] == "--workdir" else []
  sentence = mistake(tool, *argv)
  if kind != "no keys":
    assert said in sentence and "mine.py" in sentence
  elif "training" in TAKES[tool]:
    assert said in sentence or "stage is None" in sentence


@pytest.mark.parametrize("tool", TAKES)
@pytest.mark.parametrize(
  "argv, said",
  [
    (["--config=nowhere.py"], "nowhere.py does not exist"),
    (["--config=nowhere.txt"], "must name a .py file"),
    (["--config.sead=1"], "did you mean seed"),
    (["--config.seed=x"], "must be a whole number"),
    (["--config.seed"], "has no value"),
  ],
)
def test_a_bad_key_or_path_of_a_configuration(tool, argv, said, mistake):
  workdir = ["--workdir=run"] if COMMANDS[tool][1] == "--workdir" else []
  assert said in mistake(tool, *COMMANDS[tool][0], *workdir, *argv)


@pytest.mark.parametrize("lora", ["/nope", "/nope:0.5", str(TINY)])
def test_an_adapter_that_is_not_there(lora, mistake):
  images, _ = COMMANDS["rtdmd_jax.sample"]
  said = mistake("rtdmd_jax.sample", *images, "--workdir=run", f"--lora={lora}")
  assert lora.removesuffix(":0.5") in said
  said = mistake(
    "rtdmd_jax.export", f"--pipeline={TINY}", f"--lora={lora}", "--format=peft", "--out=out"
  )
  assert lora.removesuffix(":0.5") in said


def test_what_another_tool_takes_is_unknown_to_one_that_does_not(mistake):
  argv, _ = COMMANDS["rtdmd_jax.export"]
  assert "'config'" in mistake("rtdmd_jax.export", *argv, "--out=x", f"--config={TINY}")
  assert "'workdir'" in mistake("rtdmd_jax.datasets.geneval", "--out=x", "--workdir=x")


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpux"])
def test_a_platform_that_is_not_there(platform, tmp_path):
  argv, flag = COMMANDS["rtdmd_jax.sample"]
  done = subprocess.run(
    [sys.executable, "-m", "rtdmd_jax.sample", *argv, f"{flag}={tmp_path}"],
    env=os.environ | {"JAX_PLATFORMS": platform, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    cwd=tmp_path,
  )
  last = done.stderr.strip().splitlines()[-1]
  assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
  assert last.startswith(f"error: JAX_PLATFORMS is {platform!r}") and "pip install" in last


@pytest.mark.parametrize(
  "topology, error, words",
  [
    ("v5e:2x2", RuntimeError, r"needs libtpu .*pip install .*\[tpu\]"),
    ("h100:8", NotImplementedError, r"needs jax's CUDA plugin .*pip install .*\[gpu-aot\]"),
  ],
)
def test_ahead_of_time_without_its_compiler(topology, error, words, mistake, monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)

  def absent(**_):
    raise error("not installed")

  monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", absent)
  from rtdmd_jax.aot.topology import find_topology
  from rtdmd_jax.errors import UserError

  with pytest.raises(UserError, match=words):
    find_topology(topology)


def test_how_to_install_an_extra_without_a_clone(monkeypatch, tmp_path):
  assert extras.install_line("ocr").endswith(f'-m pip install -e "{ROOT}[ocr]"')
  monkeypatch.setattr(extras.rtdmd_jax, "__file__", str(tmp_path / "rtdmd_jax/__init__.py"))
  lines = ["numpy==1", "gradio==6; extra == 'studio'", 'jax[tpu]; extra == "tpu"']
  monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
  assert extras.install_line("studio").endswith("-m pip install gradio==6")
  assert extras.install_line("tpu").endswith("-m pip install 'jax[tpu]'")


def test_a_python_that_is_too_old():
  old = "import sys\nsys.version_info = (3, 10, 4)\nsys.version = '3.10.4 (main)'\n"
  for code, lines in (("sys.argv = ['-m']\n", 1), ("", 5)):
    command = [sys.executable, "-c", f"{old}{code}import rtdmd_jax"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (2 if code else 1)
    assert "needs Python 3.11 or newer; this is 3.10.4" in done.stderr
    assert len(done.stderr.splitlines()) <= lines or not code


def test_output_that_nobody_reads(tmp_path):
  command = f"{sys.executable} -m rtdmd_jax.main --check --config={CONFIGS['pretraining']} | true"
  done = subprocess.run(
    ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.stderr == "" and done.stdout in ("0\n", "141\n")
