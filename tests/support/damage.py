"""JSON and bytes that are nearly right."""

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

TEXT = st.text(max_size=12) | st.sampled_from(["", "\ud800", "../x", "a\x00b", "\u202e", "nan"])
NUMBERS = (
  st.integers(-3, 3) | st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([10**400, 1e39])
)
JSON = st.recursive(
  st.none() | st.booleans() | NUMBERS | TEXT,
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
  max_leaves=5,
)
_STRANGE = [b"", b"null", b"{", b"[1,]", b'{"a": 1,}', b"\xef\xbb\xbf{}", b"\xff\xfe{}", b"NaN"]
_STRANGE += [b'"\\ud800"', b"\x00", b"[1e999]", b'{"a": 1}{}', b"1" * 5000]
_STRANGE += [b"[" * 100_000, b'{"a":' * 100_000]
STRANGE_JSON = st.integers(0, len(_STRANGE) - 1).map(_STRANGE.__getitem__)


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
  yield path
  if isinstance(value, dict | list):
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
      yield from _places(inner, (*path, key))


@st.composite
def damaged(draw, document: Any) -> Any:
  """A JSON value with one to three of its parts replaced, removed, renamed or added."""
  document = copy.deepcopy(document)
  for _ in range(draw(st.integers(1, 3))):
    *parents, last = draw(st.sampled_from([p for p in _places(document) if p] or [("",)]))
    if not isinstance(document, dict | list) or not document:
      return draw(JSON)
    inner = document
    for key in parents:
      inner = inner[key]
    kind = draw(st.sampled_from(["replace", "replace", "remove", "rename", "add"]))
    if kind == "replace":
      inner[last] = draw(JSON)
    elif kind == "remove":
      del inner[last]
    elif isinstance(inner, dict):
      inner[draw(TEXT)] = inner.pop(last) if kind == "rename" else draw(JSON)
    else:
      inner.append(draw(JSON))
  return document


@st.composite
def mangled(draw, data: bytes) -> bytes:
  """Bytes with one to three cuts, flipped bits, insertions, removals or repetitions."""
  for _ in range(draw(st.integers(1, 3))):
    start, length = draw(st.integers(0, len(data))), draw(st.integers(0, 40))
    stop = start + length
    kind = draw(st.sampled_from(["cut", "flip", "insert", "remove", "repeat"]))
    if kind == "cut":
      data = data[:start]
    elif kind == "flip" and start < len(data):
      changed = data[start] ^ (1 << draw(st.integers(0, 7)))
      data = data[:start] + bytes([changed]) + data[start + 1 :]
    elif kind == "insert":
      data = data[:start] + draw(st.binary(min_size=1, max_size=8)) + data[start:]
    elif kind == "remove":
      data = data[:start] + data[stop:]
    else:
      data = data[:stop] + data[start:]
  return data


def json_files(document: Any) -> st.SearchStrategy[bytes]:
  """Contents of a JSON file that should have held `document`."""
  dumped = damaged(document).map(dump)
  return st.one_of(dumped, dumped, mangled(dump(document)), STRANGE_JSON)


def dump(value: Any) -> bytes:
  """JSON, with the non-standard NaN and Infinity."""
  return json.dumps(value).encode()
