"""A cache of Hugging Face's hub that is laid out by hand."""

import os
from pathlib import Path

from huggingface_hub import constants

COMMIT, OTHER = "a" * 40, "b" * 40


def use(monkeypatch, home):
  """Makes `home` the hub's home, and `home/here` the empty working directory."""
  (home / "here").mkdir()
  monkeypatch.chdir(home / "here")
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))


def cache(home, repository, files, commit=COMMIT, revision="main"):
  """Lays a copy out as the hub's client does: links to blobs below the commit, and a reference.

  Args:
    home: of the cache.
    repository: org/name.
    files: the text of each file, or the path of another that it is.
    commit: of the copy.
    revision: that refers to it.
  """
  folder = home / "hub" / f"models--{repository.replace('/', '--')}"
  (folder / "blobs").mkdir(parents=True, exist_ok=True)
  (folder / "refs").mkdir(exist_ok=True)
  (folder / "refs" / revision).write_text(commit)
  for number, (name, content) in enumerate(files.items()):
    blob, file = folder / f"blobs/{commit[:1]}{number}", folder / "snapshots" / commit / name
    if isinstance(content, Path):
      blob.symlink_to(content.resolve())
    else:
      blob.write_text(content)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to(os.path.relpath(blob, file.parent))
  return folder / "snapshots" / commit


def copy(home, repository, directory):
  """`cache` of all files of a directory."""
  files = {str(p.relative_to(directory)): p for p in directory.rglob("*") if p.is_file()}
  return cache(home, repository, files)
