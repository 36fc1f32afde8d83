"""Encodings of prompts, kept on the host."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from rtdmd_jax.runtime.sharding import to_numpy

Tree = Any
_MOST_AT_ONCE = 32


def encoding_chunk(prompts: int, parts: int = 1) -> int:
  """How many prompts to encode at once, so that a batch of new ones leaves few places empty.

  Args:
    prompts: distinct ones of a batch.
    parts: a divisor of the result: the devices that share the work (`sharding.batch_parts`).
  """
  most = max(_MOST_AT_ONCE // parts, 1) * parts
  at_once = -(-prompts // -(-prompts // most))
  return -(-at_once // parts) * parts


class PromptCache:
  """Encodings of prompts, of which the host keeps the last used ones.

  Published prompt sets are visited once in thousands of steps, so what is kept is bounded: a batch
  of new prompts is encoded, and the oldest encodings make room for it. Evaluation prompts and small
  prompt sets are encoded once.
  """

  def __init__(
    self, encode: Callable[[list[str]], Tree], *, chunk: int = 32, max_bytes: float = 1e9
  ):
    """Starts empty.

    Args:
      encode: maps a list of `chunk` prompts to a tree of arrays [chunk, ...].
      chunk: prompts encoded at once.
      max_bytes: of the encodings that are kept; 0 keeps none.
    """
    self._encode, self._chunk, self._max_bytes = encode, chunk, max_bytes
    self._rows: OrderedDict[str, Tree] = OrderedDict()
    self._bytes = 0

  def __call__(self, prompts: Sequence[str]) -> Tree:
    """The encodings [P, ...] of P prompts, as numpy arrays of the encoders' own types."""
    places: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
      places.setdefault(prompt, []).append(i)
    result = None
    for prompt, row in self._encodings(list(places)):
      if result is None:
        shape = lambda a: np.empty((len(prompts), *a.shape), a.dtype)  # noqa: E731
        result = jax.tree.map(shape, row)
      for out, values in zip(jax.tree.leaves(result), jax.tree.leaves(row), strict=True):
        out[places[prompt]] = values
    return result

  def _encodings(self, prompts: list[str]) -> Iterator[tuple[str, Tree]]:
    """(prompt, encoding) of distinct prompts: the kept ones, then the new ones chunk by chunk."""
    new = [prompt for prompt in prompts if prompt not in self._rows]
    for prompt in prompts:
      if prompt in self._rows:
        self._rows.move_to_end(prompt)
        yield prompt, self._rows[prompt]
    for start in range(0, len(new), self._chunk):
      part = new[start : start + self._chunk]
      # A constant size, so that the encoders are compiled once.
      padded = part + [part[-1]] * (self._chunk - len(part))
      tree = to_numpy(self._encode(padded))
      for i, prompt in enumerate(part):
        row = jax.tree.map(lambda a, i=i: a[i], tree)
        self._keep(prompt, row)
        yield prompt, row

  def _keep(self, prompt: str, row: Tree) -> None:
    """Stores a copy, as a view would keep the whole chunk; the oldest make room for it."""
    size = sum(a.nbytes for a in jax.tree.leaves(row))
    if size > self._max_bytes:
      return
    self._rows[prompt] = jax.tree.map(np.copy, row)
    self._bytes += size
    while self._bytes > self._max_bytes:
      _, oldest = self._rows.popitem(last=False)
      self._bytes -= sum(a.nbytes for a in jax.tree.leaves(oldest))
