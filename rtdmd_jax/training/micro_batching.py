"""Batches in parts, one after the other, so that memory is that of a part."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rtdmd_jax.runtime.sharding import batch_parts, constrain

Tree = Any


def map_parts(fn: Callable[..., Tree], parts: int, *rows: jax.Array) -> Tree:
  """`fn` of all rows, a part of them at a time.

  A part is every `parts`-th row: of a batch that is split over devices it takes its share from
  each device's own rows.

  Args:
    fn: maps arrays [n / parts, ...] to a tree of arrays [n / parts, ...], row by row.
    parts: a divisor of n.
    *rows: arrays [n, ...].

  Returns:
    a tree of arrays [n, ...].
  """
  if parts == 1:
    return fn(*rows)

  def join(a: jax.Array) -> jax.Array:
    return jnp.swapaxes(a, 0, 1).reshape(-1, *a.shape[2:])

  def one(part: tuple[jax.Array, ...]) -> Tree:
    return jax.tree.map(constrain, fn(*jax.tree.map(constrain, part)))

  return jax.tree.map(join, jax.lax.map(one, _interleaved(rows, parts)))


def accumulated_grad(
  loss_fn: Callable[..., tuple[jax.Array, Tree]],
  params: Tree,
  micro_batches: int,
  *rows: jax.Array,
) -> tuple[Tree, Tree]:
  """Mean gradient and auxiliary results of `loss_fn(params, *rows)` over micro-batches, by scan.

  Args:
    loss_fn: of parameters and the arrays [n / micro_batches, ...] of a micro-batch.
    params: what the gradient is of.
    micro_batches: a divisor of n; they are cut as in `map_parts`.
    *rows: arrays [n, ...].
  """
  grad_fn = jax.grad(loss_fn, has_aux=True)
  if micro_batches == 1:
    return grad_fn(params, *rows)

  def add(total: Tree, part: tuple[jax.Array, ...]) -> tuple[Tree, Tree]:
    grads, aux = grad_fn(params, *jax.tree.map(constrain, part))
    return jax.tree.map(jnp.add, total, grads), aux

  start = jax.tree.map(jnp.zeros_like, params)
  total, aux = jax.lax.scan(add, start, _interleaved(rows, micro_batches))
  return jax.tree.map(lambda g: g / micro_batches, total), jax.tree.map(jnp.mean, aux)


def _interleaved(rows: Tree, parts: int) -> Tree:
  """Arrays [n, ...] as [parts, n / parts, ...], part k of every `parts`-th row from k on."""
  return jax.tree.map(lambda a: jnp.swapaxes(a.reshape(-1, parts, *a.shape[1:]), 0, 1), rows)


def sorted_parts(last: jax.Array, parts: int, rows: Tree) -> Tree:
  """Rows as micro-batches, those marked `last` as far at the end as they go.

  Each device sorts the rows that it holds and gives every micro-batch its share of them, so no row
  travels to another device. The order within a device stays.

  Args:
    last: bool [n].
    parts: into how many micro-batches; a device's number of rows is a multiple of it.
    rows: a tree of arrays [n, ...].

  Returns:
    a tree of arrays [parts, n / parts, ...].
  """
  devices = batch_parts()
  order = jnp.argsort(constrain(last.reshape(devices, -1)), stable=True)

  def one(a: jax.Array) -> jax.Array:
    own = constrain(a.reshape(*order.shape, *a.shape[1:]))
    own = constrain(jax.vmap(lambda rows, order: rows[order])(own, order))
    own = own.reshape(devices, parts, -1, *a.shape[1:])
    return jnp.swapaxes(own, 0, 1).reshape(parts, -1, *a.shape[1:])

  return jax.tree.map(one, rows)
