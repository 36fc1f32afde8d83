"""What the pages say of keys, metrics and tools exists."""

import re
from pathlib import Path

from rtdmd_jax.config import flatten, load_config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_every_page_is_in_the_navigation():
  listed = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
  assert sorted(listed) == sorted(p.name for p in DOCS.glob("*.md"))


def test_keys_of_the_configuration():
  config = load_config(str(ROOT / "configs/sd35_stage2.py")).to_dict()
  sections = "|".join(name for name, value in config.items() if isinstance(value, dict))
  text = (DOCS / "troubleshooting.md").read_text()
  named = set(re.findall(rf"\b((?:{sections})(?:\.[a-z_]+)+)", text)) - {
    "rewards.md",
    "rewards.serve",
    # Empty where it ships.
    "eval.rewards",
    "eval.rewards.aesthetic",
  }
  known = {key for key, _ in flatten(config)}
  assert len(named) > 10 and named <= known, named - known


def test_metrics():
  source = "".join(path.read_text() for path in (ROOT / "rtdmd_jax").rglob("*.py"))
  text = (DOCS / "troubleshooting.md").read_text()
  names = set(re.findall(r"`([a-z_]+/[a-z_<>]+)`", text)) - {"export/generator"}
  assert len(names) > 10
  for name in names:
    head, tail = name.split("/")
    composed = f'f"{head}/{{' in source or f'/{tail}"' in source
    assert f'"{name}"' in source or composed, name


def test_scripts():
  text = (DOCS / "launch.md").read_text()
  scripts = {p.name for p in (ROOT / "launch").glob("*.sh")} - {"lib.sh", "test.sh"}
  assert scripts == set(re.findall(r"^\| `launch/(\w+\.sh)`", text, re.M))
