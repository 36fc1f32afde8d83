"""Names in the pages: keys, metrics, modules, anchors and the order of imports."""

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

from rtdmd_jax.config import flatten, load_config
from rtdmd_jax.rewards import device_rewards, host_rewards, multi
from rtdmd_jax.rewards.host.ocr import OCR
from rtdmd_jax.rewards.remote.reward import RemoteReward
from tests.support.docs_blocks import (
  ROOT,
)

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
FOLDERS = sorted(path.parent.name for path in (ROOT / "rtdmd_jax").glob("*/__init__.py"))
TOP = sorted(p.stem for p in (ROOT / "rtdmd_jax").glob("*.py") if p.stem != "__init__")
FILES = (".html", ".json", ".jsonl", ".md", ".py", ".safetensors", ".txt")
NETWORKS = ("generator", "fake_score")


def _inline(page):
  """The inline code of a page, without its blocks."""
  return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S))


def test_every_page_is_in_the_navigation():
  listed = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
  assert sorted(listed) == sorted(p.name for p in DOCS.glob("*.md"))


def test_every_anchor_is_a_heading():
  anchors = {}
  for page in PAGES:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    plain = [re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in titles]
    anchors[page] = {re.sub(r"\s", "-", title) for title in plain}
  for page in PAGES:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
      linked = (page.parent / target).resolve() if target else page
      assert anchor in anchors[linked], f"{page.name}: {target}#{anchor}"


def _known_keys():
  """Keys of the stages' configurations and their sections."""
  keys, sections = set(), set()
  for path in (ROOT / "configs").glob("*_stage*.py"):
    config = load_config(str(path)).to_dict()
    keys |= {"eval.rewards", *(key for key, _ in flatten(config))}
    keys |= {key.rpartition(".")[0] for key in keys}
    sections |= {name for name, value in config.items() if isinstance(value, dict)}
  return keys, sections


def _reward_takes(name, option):
  """Whether a reward of a configuration may have an option; `NAME` is any reward."""
  if name == "NAME":
    return option in (None, *multi.RUN_KEYS, "max_failed", "dtype", "compat")
  if name in device_rewards.NAMES:
    module, attribute = device_rewards._CLASSES[name]
    build = getattr(import_module(module), attribute).from_pretrained
    return option in (None, *multi.RUN_KEYS, *inspect.signature(build).parameters)
  services = (*inspect.signature(RemoteReward).parameters, *inspect.signature(OCR).parameters)
  return name in host_rewards.FACTORIES and option in (None, *multi.RUN_KEYS, *services)


def _is_key(key, known):
  options = re.fullmatch(r"(?:eval\.)?rewards\.(\w+)(?:\.(\w+))?", key)
  return key in known or bool(options and _reward_takes(*options.groups()))


def _exists(name):
  """Whether a dotted name is a module of the package or of the benchmarks, or something in one."""
  parts = name.split(".")
  if parts[0] not in ("rtdmd_jax", "benchmarks", "tests"):
    parts = ["rtdmd_jax", *parts]
  for end in range(len(parts), 0, -1):
    try:
      thing = import_module(".".join(parts[:end]))
    except ModuleNotFoundError:
      continue
    for attribute in parts[end:]:
      if not hasattr(thing, attribute):
        return False
      thing = getattr(thing, attribute)
    return True
  return False


def test_dotted_names_are_keys_or_in_the_package():
  """Whatever looks like a key of the configuration or like a module, in any page, is one."""
  known, sections = _known_keys()
  first = "|".join(sorted({*sections, *FOLDERS, "rtdmd_jax", "benchmarks"}))
  named = re.compile(rf"(?:-m |--config\.)?((?:{first})(?:\.\w+)+)(?:[=(].*)?")
  checked, wrong = 0, []
  for page in PAGES:
    for code in _inline(page):
      if not (match := named.fullmatch(code)):
        continue
      name, checked = match[1], checked + 1
      if Path(name).suffix not in FILES and not _is_key(name, known) and not _exists(name):
        wrong.append((page.name, name))
  assert not wrong and checked > 60


@pytest.mark.parametrize(
  "name", ["train.keeps", "rewards.ocr.worker", "rewards.orc", "models.stack.stack", "rtdmd_jax.no"]
)
def test_a_wrong_name_is_found(name):
  assert not _is_key(name, _known_keys()[0]) and not _exists(name)


def _metrics():
  """Patterns of the metrics that programs write; what is put into a name is known, too."""
  keys, patterns = set(), set()
  for path in (ROOT / "rtdmd_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Dict) and path.parent.name in ("algo", "training"):
        keys |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
      elif isinstance(node, ast.JoinedStr):
        parts = [p.value if isinstance(p, ast.Constant) else "*" for p in node.values]
        patterns.add("".join(map(str, parts)))
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        patterns.add(node.value)
  rewards = "|".join((*device_rewards.NAMES, *host_rewards.FACTORIES, "<name>", "<reward>"))
  fillers = {
    **dict.fromkeys(("reward", "reward_std", "reward_failed", "eval"), rewards),
    **dict.fromkeys(("loss", *NETWORKS), "|".join(map(re.escape, sorted(map(str, keys))))),
  }
  for pattern in patterns:
    head, slash, tail = pattern.partition("/")
    if not slash or not re.fullmatch(r"[a-z_*]+/[a-z_*]+", pattern):
      continue
    heads = "|".join(NETWORKS) if head == "*" else head
    filler = fillers.get(NETWORKS[0] if head == "*" else head)
    if "*" not in tail or filler:
      yield re.compile(f"({heads})/{tail.replace('*', f'({filler})')}")


def test_metrics():
  """Each name in the text is one that the source writes, `<name>` being what is put into one."""
  written = list(_metrics())
  heads = "advantage|eval|fake_score|generator|images|loss|ratio|reward|reward_failed|reward_std"
  checked = 0
  for page in PAGES:
    for name in _inline(page):
      if re.fullmatch(rf"({heads}|samples)/[a-z_<>]+", name):
        assert any(pattern.fullmatch(name) for pattern in written), (page.name, name)
        checked += 1
  assert checked > 25
  for wrong in ("loss/police", "eval/clipscores", "ratio/drifts", "generator/grad_nrom"):
    assert not any(pattern.fullmatch(wrong) for pattern in written), wrong


def test_architecture():
  """Functions stand where the page says, and imports only go down its list."""
  text = (DOCS / "architecture.md").read_text()
  for path, names in re.findall(r"`((?:\w+/)*\w+\.py)`: ((?:`\w+`(?:, )?)+)", text):
    tree = ast.parse((ROOT / "rtdmd_jax" / path).read_text())
    defined = {node.name for node in tree.body if hasattr(node, "name")}
    assert set(re.findall(r"\w+", names)) <= defined, path
  order = re.search(r"to its left: ([\w,\s]+)\.", text)[1].replace("\n", " ").split(", ")
  assert sorted(order) == sorted([*TOP, *FOLDERS])
  for path in (ROOT / "rtdmd_jax").rglob("*.py"):
    own = path.relative_to(ROOT / "rtdmd_jax").parts[0].removesuffix(".py")
    if own in order:
      for name in _imported(path):
        assert order.index(name) <= order.index(own), f"{path} imports {name}"


def _imported(path):
  """The folders and modules of the package's top that a file imports anything of."""
  for node in ast.walk(ast.parse(path.read_text())):
    names = []
    if isinstance(node, ast.ImportFrom) and node.module:
      names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    elif isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    for name in names:
      package, _, rest = name.partition(".")
      top = rest.partition(".")[0]
      if package == "rtdmd_jax" and top in (*TOP, *FOLDERS):
        yield top


def test_scripts():
  text = (DOCS / "launch.md").read_text()
  scripts = {p.name for p in (ROOT / "launch").glob("*.sh")} - {"lib.sh", "test.sh"}
  assert scripts == set(re.findall(r"^\| `launch/(\w+\.sh)`", text, re.M))
