import json
import subprocess
import sys
from pathlib import Path

import pytest

from rtdmd_jax import cli
from rtdmd_jax.datasets import prompt_set
from rtdmd_jax.datasets.prompts import load_prompts
from rtdmd_jax.errors import UserError


def _run(*arguments):
  return cli.run(
    prompt_set.main,
    ["prompt_set", *map(str, arguments)],
    define_flags=prompt_set.define_flags,
    requires=("out",),
  )


@pytest.fixture
def files(tmp_path):
  (tmp_path / "train.txt").write_text("a red cat\nZwölf Boxkämpfer\n" + "a dog\n" * 30)
  record = {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "two cups"}
  (tmp_path / "test.jsonl").write_text(json.dumps(record) + "\n" + json.dumps("a bird") + "\n")
  return tmp_path


def test_a_prepared_set_reads_as_the_files_did(files, capsys):
  data = files / "data"
  sources = [f"--train={files / 'train.txt'}", f"--test={files / 'test.jsonl'}"]
  assert _run(*sources, f"--out={data}") == 0
  folder = Path(capsys.readouterr().out.splitlines()[-1].rpartition(":")[0])
  assert list(folder.glob("*.array_record*"))
  assert load_prompts(folder) == load_prompts(files / "train.txt")
  assert load_prompts(folder, split="test", metadata=True) == load_prompts(files / "test.jsonl")
  assert _run(f"--train={files / 'train.txt'}", f"--out={data}") == 2
  assert "exists" in capsys.readouterr().err


def test_what_is_not_there_is_named(files, capsys):
  assert _run(f"--out={files / 'data'}") == 2
  assert _run(f"--train={files / 'none.txt'}", f"--out={files / 'data'}") == 2
  assert _run(f"--train={files / 'train.txt'}", f"--out={files}", "--name=../up") == 2
  assert "letters" in capsys.readouterr().err and not (files / "data").exists()
  assert _run(f"--train={files / 'train.txt'}", f"--out={files / 'data'}") == 0
  folder = files / "data/prompt_set/prompts/1.0.0"
  with pytest.raises(UserError, match="split test"):
    load_prompts(folder, split="test")
  for shard in folder.glob("*.array_record*"):
    shard.write_bytes(b"broken")
  with pytest.raises(UserError, match="can be read"):
    load_prompts(folder)


def test_tensorflow_is_not_imported(files):
  code = f"""
import sys
from rtdmd_jax import cli
from rtdmd_jax.datasets import prompt_set as p
argv = ["p", "--train={files / "train.txt"}", "--out={files / "data"}"]
assert cli.run(p.main, argv, define_flags=p.define_flags, requires=("out",)) == 0
from rtdmd_jax.datasets.prompts import load_prompts
assert len(load_prompts("{files / "data/prompt_set/prompts/1.0.0"}")) == 32
assert "tensorflow" not in sys.modules
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
