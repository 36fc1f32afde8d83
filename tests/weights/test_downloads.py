"""What is known of published files covers the configs, and the pages print it."""

from pathlib import Path

import pytest

from rtdmd_jax.config import flatten, load_config
from rtdmd_jax.datasets.prompts import load_prompts
from rtdmd_jax.errors import UserError
from rtdmd_jax.weights import downloads
from rtdmd_jax.weights.hub import Repository, fetch_command
from rtdmd_jax.weights.hub_files import KINDS
from rtdmd_jax.weights.reward_files import _KINDS
from tests.support.paths import ROOT

CONFIGS = [p for p in sorted((ROOT / "configs").glob("*_*.py")) if not p.name.startswith("tiny")]


def test_the_sizes_are_of_what_can_be_taken():
  for repository, source in downloads.SOURCES.items():
    assert Repository.parse(repository) == (repository, None, None)
    for taken, (files, gigabytes) in source.sizes.items():
      assert taken in KINDS or "." in taken
      assert files >= 1 and 0 < gigabytes < 100


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_name_in_a_config_has_its_size(path):
  config = load_config(str(path)).to_dict()
  found = []
  for key, value in flatten(config):
    if key in ("model.pretrained", "pipeline"):
      found.append((value, "pipeline"))
    elif key.startswith("model.") and key.endswith("_init") and value:
      found.append((value, "transformer"))
    elif "rewards." in key and key.split(".")[-1] in _KINDS.get(key.split(".")[-2], {}):
      found.append((value, _KINDS[key.split(".")[-2]][key.split(".")[-1]]))
  assert found
  for name, kind in found:
    repository = Repository.parse(name)
    source = downloads.SOURCES[repository.id]
    assert (repository.file or kind) in source.sizes, (name, kind)


def test_prompt_sets_of_the_configs_are_known():
  named = set()
  for path in CONFIGS:
    for _, value in flatten(load_config(str(path)).to_dict()):
      if isinstance(value, str) and value.startswith("prompts/"):
        named.add(value.split("/")[1])
  assert named == set(downloads.PROMPT_SETS)


@pytest.mark.parametrize("name", downloads.PROMPT_SETS)
@pytest.mark.parametrize("made", [None, ".", "test.txt"])
def test_missing_prompts_say_where_they_are_from(name, made, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = Path("prompts") / name
  if made == ".":
    path.mkdir(parents=True)
  known = downloads.PROMPT_SETS[name]
  with pytest.raises(UserError) as caught:
    load_prompts(path / made if made == "test.txt" else path)
  sentence = str(caught.value)
  for part in (known.files, f"`{known.fetch}`", known.licence):
    assert part in sentence
  with pytest.raises(UserError, match="mine.txt does not exist$"):
    load_prompts("mine.txt")


def model_rows():
  """The table of docs/backbones.md."""
  for repository, source in downloads.SOURCES.items():
    taken, size = next(iter(source.sizes.items()))
    name = f"{repository}/{taken}" if "." in taken else repository
    cell, own = downloads.size_text(*size), source.sizes.get("transformer")
    cell += f" (transformer {own[1]:g})" if own else ""
    gate = "yes" if source.gated else "no"
    yield f"| `{name}` | {source.what} | {cell} | {source.licence} | {gate} |"


def test_the_pages_print_the_tables():
  page = (ROOT / "docs/backbones.md").read_text()
  rows = [line for line in page.splitlines() if line.endswith(("| yes |", "| no |"))]
  assert rows == list(model_rows())
  page = (ROOT / "docs/data.md").read_text()
  for name, known in downloads.PROMPT_SETS.items():
    assert f"| `prompts/{name}` | {known.files} | {known.licence} |" in page
    assert known.fetch in page
  commands = (ROOT / "docs/backbones.md").read_text()
  assert fetch_command(Repository.parse("stabilityai/stable-diffusion-3.5-medium")) in commands
  name = "christophschuhmann/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth"
  assert fetch_command(Repository.parse(name)) in commands
