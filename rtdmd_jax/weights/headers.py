"""Loading without values: files are opened, keys and shapes checked, and nothing more is read."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
from flax.traverse_util import unflatten_dict

_headers: ContextVar[bool] = ContextVar("headers", default=False)


@contextmanager
def headers_only() -> Iterator[None]:
  """Inside, `load_params` and `params_from_tensors` return trees of `jax.ShapeDtypeStruct`s.

  They check keys and shapes as ever.
  """
  token = _headers.set(True)
  try:
    yield
  finally:
    _headers.reset(token)


def wanted() -> bool:
  """Whether the caller is inside of `headers_only`."""
  return _headers.get()


def shapes_of(leaves: Mapping[tuple[str, ...], Any], dtype: Callable[..., Any]) -> Any:
  """The tree of shapes of leaves by path; `dtype` maps a path and a leaf to the type it gets."""
  return unflatten_dict(
    {path: jax.ShapeDtypeStruct(leaf.shape, dtype(path, leaf)) for path, leaf in leaves.items()}
  )
