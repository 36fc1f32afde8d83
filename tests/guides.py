"""The blocks of docs/guides.md, as a reader would run them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(section):
  """(language, text) of every block under a heading."""
  page = (ROOT / "docs/guides.md").read_text()
  (body,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
  return re.findall(r"^```(\w+)\n(.*?)^```", body, re.M | re.S)


def checkout(folder):
  """A folder that looks like the root of a checkout."""
  shutil.copytree(ROOT / "configs", folder / "configs")
  (folder / "rtdmd_jax").symlink_to(ROOT / "rtdmd_jax")
  return folder


def run(section, folder):
  """Writes or runs every block of a section in `folder`; the output of all commands."""
  seen = ""
  for language, text in blocks(section):
    name = re.match(r"# (\S+\.py)\n", text)
    if name:
      (folder / name[1]).write_text(text)
      continue
    command = [sys.executable, "-c", text] if language == "python" else ["bash", "-ec", text]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    seen += done.stdout
  return seen
