"""`--help` of every tool of the package."""

import re
import runpy
import sys

import pytest

from tests.support.tools import TOOLS


def test_all_tools_are_found():
  assert {"rtdmd_jax.main", "rtdmd_jax.aot", "rtdmd_jax.rewards.serve"} < set(TOOLS)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize("tool", TOOLS)
def test_help(tool, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", [tool, "--help"])
  with pytest.raises(SystemExit) as stopped:
    runpy.run_module(tool, run_name="__main__")
  out, err = capsys.readouterr()
  assert stopped.value.code == 0 and err == ""
  assert f"python -m {tool}" in out
  assert re.search(r"\breads?\b", out, re.I) and re.search(r"\bwrites?\b", out, re.I)
  assert max(map(len, out.splitlines())) <= 100
