"""A tool for the tests."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from rtdmd_jax import cli
from rtdmd_jax.errors import UserError
from tests.support.console import rtdmd

CONFIG = (
  "from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({'a': {'b': 1}})"
)


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / "c.py"
  path.write_text(CONFIG)
  return str(path)


def define(values):
  flags.DEFINE_integer("count", 3, "How many.", flag_values=values)


def call(*argv, requires=(), main=None, **how):
  seen = []
  argv = ["tool", *argv]
  code = cli.run(main or seen.append, argv, define_flags=define, requires=requires, **how)
  return code, seen


def test_everything_reaches_main(config_file, tmp_path):
  code, (got,) = call(
    f"--config={config_file}", "--config.a.b=5", f"--workdir={tmp_path}", "--count=4", "x", "y",
    positional=True,
  )  # fmt: skip
  assert code == 0
  assert (got.config.a.b, got.workdir, got.flags.count, got.args) == (5, tmp_path, 4, ("x", "y"))


def test_override_with_a_space_and_double_dash(config_file):
  _, (got,) = call("--config", config_file, "--config.a.b", "9", "--", "-x", positional=True)
  assert got.config.a.b == 9 and got.args == ("-x",)


@pytest.mark.parametrize(
  "argv, requires, message",
  [
    (["--cuont=1"], (), "Unknown command line flag 'cuont'. Did you mean: count"),
    (["--count=x"], (), "flag --count=x"),
    ([], ("workdir",), "--workdir is required: Folder of the run"),
    (["--workdir="], ("workdir",), "--workdir is required: Folder of the run"),
    (["--workdir="], (), "--workdir is empty"),
    (["x"], (), "'x' belongs to no flag"),
    (["--config=missing.py"], (), "missing.py does not exist"),
    (["--config.a.b=1"], (), "--config.a.b=1 needs --config=FILE.py"),
  ],
)
def test_mistakes_are_one_sentence(capsys, argv, requires, message):
  code, seen = call(*argv, requires=requires)
  out, err = capsys.readouterr()
  assert code == 2 and not seen and out == ""
  assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_errors_of_main(capsys):
  def user_error(_):
    raise UserError("two\nlines")

  def interrupt(_):
    raise KeyboardInterrupt

  def defect(_):
    raise ValueError("a defect")

  def disk(number):
    def refuse(_):
      raise OSError(number, os.strerror(number), "some/file")

    return refuse

  for number, said in ((errno.ENOSPC, "make room"), (errno.EACCES, "permissions")):
    assert call(main=disk(number))[0] == 2
    err = capsys.readouterr().err
    assert err.startswith("error: some/file cannot be written") and said in err
  with pytest.raises(OSError, match="No child"):
    call(main=disk(errno.ECHILD))
  assert call(main=user_error)[0] == 2
  assert capsys.readouterr().err == "error: two lines\n"
  assert call(main=interrupt)[0] == 130
  with pytest.raises(ValueError, match="a defect"):
    call(main=defect)


def test_help(capsys):
  def main(_):
    raise AssertionError("help must not start the tool")

  assert call("--help", main=main)[0] == 0
  out = capsys.readouterr().out
  assert out.startswith("A tool for the tests.") and "--count: How many. (default: '3')" in out


def test_process(tmp_path):
  tool = tmp_path / "tool.py"
  tool.write_text(
    '"""Tool."""\nimport sys\nfrom rtdmd_jax import cli\n'
    "def main(call):\n  pass\n"
    "code = cli.run(main, requires=('config',))\n"
    "assert not {'jax', 'tensorflow', 'torch'} & set(sys.modules)\nsys.exit(code)\n"
  )
  environment = dict(os.environ, PYTHONPATH=str(Path(cli.__file__).parents[1]))
  for argv, code in ([], 2), (["--help"], 0):
    done = subprocess.run(
      [sys.executable, tool, *argv], env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
  assert "--config.KEY=VALUE" in done.stdout


def test_the_console_command_lists_its_tools():
  done = rtdmd("--help")
  assert done.returncode == 0
  assert {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")} == {
    "train", "check", "sample", "evaluate", "export", "report", "studio", "aot", "serve",
  }  # fmt: skip


@pytest.mark.parametrize(
  ("arguments", "code", "said"),
  [
    (["train", "--help"], 0, "--allow_config_change"),
    (["train"], 2, "--config is required"),
    (["report"], 2, "give one folder"),
    (["trian"], 2, "no command 'trian'; did you mean train?"),
    (["nothing-like-it"], 2, "there are train, check"),
    ([], 2, "Commands:"),
  ],
)
def test_the_console_command_is_the_tool(arguments, code, said):
  done = rtdmd(*arguments)
  assert done.returncode == code and said in done.stdout + done.stderr
  assert "Traceback" not in done.stderr
