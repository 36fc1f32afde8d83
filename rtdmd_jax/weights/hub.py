"""Names of models to places on this machine: paths, `checkpoints/`, Hugging Face's hub.

A name is a path, or a repository of the hub as `org/name`, with `@revision` behind it for a branch,
a tag or a commit, and with `/path/of/file.ext` for one file of it. It is looked for, in this order,
as a path, as `checkpoints/<name>` and `checkpoints/<org>/<name>`, and in huggingface_hub's cache;
what is found there is used without asking the network. Else it is downloaded into that cache. With
a revision `checkpoints/` is passed over, because a folder does not tell its revision.
"""

import errno
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from rtdmd_jax.errors import UserError
from rtdmd_jax.weights import downloads
from rtdmd_jax.weights.hub_files import lacking, patterns

CHECKPOINTS = Path("checkpoints")
# First parts of this project's own paths, which are not accounts of the hub.
_FOLDERS = ("checkpoints", "configs", "prompts", "runs")
# Last parts that are files of this machine rather than names of repositories.
_FILES = re.compile(r"\.(safetensors|pt|pth|bin|ckpt|gguf|json|jsonl|txt|py)$")
_NAME = re.compile(
  r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
  r"(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[^/@]+))?"
  r"(?:/(?P<file>[^/].*\.\w+))?"
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Repository(NamedTuple):
  """A repository of the hub, with the revision and the file that a name asks for."""

  id: str
  revision: str | None
  file: str | None

  @classmethod
  def parse(cls, name: str | os.PathLike) -> "Repository | None":
    """Reads `org/name[@revision][/path/of/file.ext]`; None for what is a path of this machine."""
    match = _NAME.fullmatch(os.fspath(name))
    if match is None or (match["file"] is None and _FILES.search(match["id"])):
      return None
    first = match["id"].partition("/")[0]
    if match["id"] not in downloads.SOURCES and (first in _FOLDERS or Path(first).is_dir()):
      return None
    return cls(**match.groupdict())


def local_path(name: str | os.PathLike, kind: str = "pipeline", *, download: bool = True) -> Path:
  """The place of a model on this machine, downloaded if need be.

  Args:
    name: see the module.
    kind: what is wanted of a repository, a name in `hub_files.KINDS`; unless `name` tells a file.
    download: False asks no network: what is not here is an error.

  Returns:
    A directory, or the file. A path that does not exist and that no repository can be meant by is
    returned as it is: its reader says what is missing.

  Raises:
    UserError: it is not here and cannot be downloaded; it says which command fetches it.
  """
  path_here = find(name, kind)
  if path_here is not None:
    return path_here
  repository = Repository.parse(name)
  if repository is None:
    known = Repository.parse(downloads.known_id(name) or "")
    if known is None or (known.file is None and kind == "file"):
      return Path(name)
    target = Path(name).parent if known.file else Path(name)
    raise UserError(f"{name} does not exist; {_advice(known, kind, target)}.")
  if repository.file is None and kind == "file":
    raise UserError(
      f"{name} names a repository where a file is wanted; write {repository.id}/FILE."
    )
  if _elsewhere(repository):
    reason = "its repository is not on Hugging Face's hub"
  elif not download:
    reason = ""
  elif _offline():
    reason = "HF_HUB_OFFLINE is set"
  else:
    return _download(name, repository, kind)
  raise _absent(name, repository, kind, reason)


def find(name: str | os.PathLike, kind: str = "pipeline") -> Path | None:
  """`local_path` of what is here; None for what is not. Asks no network."""
  path = Path(name)
  if path.exists():
    return path
  repository = Repository.parse(name)
  for place in _places(path, repository):
    if place.exists():
      return place
  if repository is None or _elsewhere(repository):
    return None
  return None if repository.file is None and kind == "file" else _cached(repository, kind)


def find_file(name: str | os.PathLike, file: str) -> Path | None:
  """One file of a model's directory, if it is here, even in a copy that is not whole."""
  repository = Repository.parse(name)
  for place in (Path(name), *_places(Path(name), repository)):
    if place.is_dir():
      return place / file
  if repository is None or repository.file or _elsewhere(repository):
    return None
  return _cached(repository._replace(file=file), "file")


def title(name: str | os.PathLike) -> str:
  """The public name of a model: the repository's id, or the name of its folder."""
  path = Path(name)
  repository = None if path.exists() else Repository.parse(name)
  return path.resolve().name if repository is None else repository.id


def base_name(name: str | os.PathLike) -> str:
  """The last part of a name, without a revision."""
  return PurePath(name).name.partition("@")[0]


def _places(path: Path, repository: Repository | None) -> Sequence[Path]:
  """The places below `checkpoints/` where something may lie."""
  if repository is None:
    return [CHECKPOINTS / path] if len(path.parts) == 1 and not path.is_absolute() else []
  if repository.revision is not None:
    return []
  organisation, last = repository.id.split("/")
  if repository.file is None:
    return [CHECKPOINTS / last, CHECKPOINTS / organisation / last]
  inside = Path(repository.file)
  return [
    CHECKPOINTS / inside.name, CHECKPOINTS / last / inside,
    CHECKPOINTS / organisation / last / inside,
  ]  # fmt: skip


def _elsewhere(repository: Repository) -> bool:
  source = downloads.SOURCES.get(repository.id)
  return source is not None and bool(source.url)


def _offline() -> bool:
  from huggingface_hub import is_offline_mode

  return is_offline_mode()


def _cached(repository: Repository, kind: str) -> Path | None:
  """The copy in huggingface_hub's cache, if it has what `kind` needs."""
  from huggingface_hub import snapshot_download
  from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

  try:
    # No pattern: what another program left here has what is needed or not, and `lacking` tells.
    folder = snapshot_download(
      repository.id, revision=repository.revision, local_files_only=True, allow_patterns=[]
    )
  except (LocalEntryNotFoundError, HFValidationError):
    return None
  path = Path(folder)
  return None if lacking(path, repository.file, kind) else _inside(path, repository)


def _inside(folder: Path, repository: Repository) -> Path:
  return folder / repository.file if repository.file else folder


def _download(name: str | os.PathLike, repository: Repository, kind: str) -> Path:
  """Downloads into huggingface_hub's cache."""
  from huggingface_hub import snapshot_download
  from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
  )

  take, leave = patterns(repository.file, kind)
  print(f"downloading {name} ({_facts(repository, kind)})", file=sys.stderr)
  try:
    folder = Path(
      snapshot_download(
        repository.id, revision=repository.revision, allow_patterns=take, ignore_patterns=leave
      )
    )
  except GatedRepoError as error:
    reason = "its terms are not accepted by the account that this machine is logged in with, if any"
    raise _absent(name, repository, kind, reason, gated=True) from error
  except RepositoryNotFoundError as error:
    reason = "Hugging Face's hub has no such repository, or does not show it to this account"
    raise _absent(name, repository, kind, reason) from error
  except RevisionNotFoundError as error:
    reason = f"the repository has no revision {repository.revision}"
    raise _absent(name, repository, kind, reason) from error
  # The client lets errors of several libraries through; all mean that the download failed.
  except Exception as error:
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
      raise
    said = str(error).strip().partition("\n")[0][:200]
    raise _absent(name, repository, kind, f"{type(error).__name__}: {said}") from error
  missing = lacking(folder, repository.file, kind)
  if missing is not None:
    raise UserError(
      f"{name} has no {missing} on Hugging Face's hub, or the hub could not be reached to complete"
      f" the copy in {folder}; name another repository, or a file of it as org/name/file.ext."
    )
  return _inside(folder, repository)


def _absent(
  name: str | os.PathLike, repository: Repository, kind: str, reason: str, gated: bool = False
) -> UserError:
  """The sentence for what is not here."""
  because = f" ({reason})" if reason else ""
  advice = _advice(repository, kind, None, gated)
  return UserError(f"{name} is not on this machine{because}; {advice}.")


def _advice(repository: Repository, kind: str, target: Path | None, gated: bool = False) -> str:
  """The end of a sentence that says how to fetch something."""
  facts, command = _facts(repository, kind, gated), fetch_command(repository, kind, target)
  if _elsewhere(repository) or target is not None or repository.revision is not None:
    return f"fetch it with `{command}` ({facts})"
  place = CHECKPOINTS / PurePath(repository.file or repository.id).name
  return f"fetch it with `{command}` ({facts}), or put it into {place}"


def fetch_command(
  repository: Repository, kind: str = "pipeline", target: Path | None = None
) -> str:
  """The shell command that fetches what `local_path` looks for.

  Args:
    repository: what is wanted.
    kind: a name in `hub_files.KINDS`.
    target: the directory to put it into; None for huggingface_hub's cache.
  """
  source = downloads.SOURCES.get(repository.id)
  if source is not None and source.url:
    file = repository.file or next(iter(source.sizes))
    out = shlex.quote(str((target or CHECKPOINTS) / PurePath(file).name))
    return f"curl -fL --create-dirs -o {out} {downloads.file_url(source, file)}"
  take, leave = patterns(repository.file, kind)
  words = ["hf", "download", repository.id]
  if repository.revision:
    words.append(f"--revision={repository.revision}")
  words += [f'--include "{pattern}"' for pattern in take]
  words += [f'--exclude "{pattern}"' for pattern in leave]
  if target is not None:
    words.append(f"--local-dir={shlex.quote(str(target))}")
  return " ".join(words)


def _facts(repository: Repository, kind: str, gated: bool = False) -> str:
  """Number of files, size, licence and gate."""
  source = downloads.SOURCES.get(repository.id)
  page = f"https://huggingface.co/{repository.id}"
  gate = f"gated: first accept the terms at {page} and run `hf auth login`"
  if source is None:
    known = f"its size and licence are on {page}"
    return f"{known}; {gate}" if gated else known
  size = source.sizes.get(repository.file or kind)
  parts = [
    downloads.size_text(*size) if size else "of unknown size",
    f"licence: {source.licence}",
  ]
  return "; ".join([*parts, gate] if source.gated or gated else parts)
