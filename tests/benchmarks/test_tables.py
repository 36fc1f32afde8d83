"""benchmarks/tables.py and record.py: the pages print what the results say."""

import json

import pytest

from benchmarks import record, tables
from benchmarks.columns import TABLES, Table


def test_every_page_prints_the_tables_of_the_results():
  for page in tables.pages():
    assert tables.rewritten(page.read_text()) == page.read_text(), page.name


def test_every_result_is_complete_and_on_a_page():
  printed = {name for page in tables.pages() for name in tables.names(page.read_text())}
  stored = {path.stem for path in record.RESULTS.glob("*.json")}
  used = {TABLES[name].result for name in printed}
  # Joined to others in benchmarks/selections.py.
  assert stored == used | {"hardware_compiled", "tilt_long"}
  for name in stored:
    result = json.loads((record.RESULTS / f"{name}.json").read_text())
    assert tuple(result) == record.FIELDS, name
    assert all(result.values()), name


def test_a_page_that_differs_is_found_and_written(tmp_path, monkeypatch, capsys):
  page = tmp_path / "page.md"
  page.write_text("before\n\n<!-- table: kills -->\nold\n<!-- end -->\nafter\n")
  monkeypatch.setattr(tables, "pages", lambda: [page])
  monkeypatch.setattr(tables, "ROOT", tmp_path)
  monkeypatch.setattr("sys.argv", ["tables", "--check"])
  assert tables.main() == 1 and "old" in page.read_text()
  monkeypatch.setattr("sys.argv", ["tables"])
  assert tables.main() == 0
  lines = page.read_text().splitlines()
  assert lines[:3] == ["before", "", "<!-- table: kills -->"] and lines[-1] == "after"
  assert any(line.startswith("| seed | stage |") for line in lines) and "old" not in lines
  monkeypatch.setattr("sys.argv", ["tables", "--check"])
  assert tables.main() == 0


def test_a_table_that_does_not_exist_is_named():
  with pytest.raises(KeyError, match="no table 'nothing'"):
    tables.rewritten("<!-- table: nothing -->\n<!-- end -->")


def test_cells():
  table = Table("", {"name": "`{name}`", "x": "{x:digits}", "both": "{x:.1f} of {y}"})
  rows = [{"name": "a", "x": 1234.5, "y": 2}, {"name": "b", "x": 0.12345}]
  assert tables.render(table, rows).splitlines() == [
    "| name | x | both |",
    "| --- | ---: | --- |",
    "| `a` | 1,234 | 1234.5 of 2 |",
    "| `b` | 0.123 |  |",
  ]


def test_rows_of_other_names_stay_and_keep_where_they_are_from(tmp_path, monkeypatch):
  monkeypatch.setattr(record, "RESULTS", tmp_path)
  monkeypatch.setattr(record, "commit", lambda: "one")
  record.write("result", [{"seed": 1, "x": 1}, {"seed": 2, "x": 2}], keys=("seed",))
  monkeypatch.setattr(record, "commit", lambda: "two")
  record.write("result", [{"seed": 2, "x": 3}], keys=("seed",))
  assert record.read("result") == [{"commit": "one", "seed": 1, "x": 1}, {"seed": 2, "x": 3}]
  assert json.loads((tmp_path / "result.json").read_text())["commit"] == "two"
  record.write("result", [{"seed": 3}])
  assert record.read("result") == [{"seed": 3}]
