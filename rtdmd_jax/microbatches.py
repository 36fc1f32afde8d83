"""Batches in parts, one after the other, so that memory is that of a part."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rtdmd_jax.sharding import constrain

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

  def split(a: jax.Array) -> jax.Array:
    return jnp.swapaxes(a.reshape(-1, parts, *a.shape[1:]), 0, 1)

  def join(a: jax.Array) -> jax.Array:
    return jnp.swapaxes(a, 0, 1).reshape(-1, *a.shape[2:])

  def one(part: tuple[jax.Array, ...]) -> Tree:
    return jax.tree.map(constrain, fn(*jax.tree.map(constrain, part)))

  return jax.tree.map(join, jax.lax.map(one, tuple(split(a) for a in rows)))


def accumulated_grad(
  loss_fn: Callable[[Tree, jax.Array], tuple[jax.Array, Tree]],
  params: Tree,
  count: int,
  micro_batches: int,
) -> tuple[Tree, Tree]:
  """Mean gradient and auxiliary results of `loss_fn(params, rows)` over micro-batches, by scan.

  Args:
    loss_fn: of parameters and the numbers [count / micro_batches] of a micro-batch's samples.
    params: what the gradient is of.
    count: samples of the batch.
    micro_batches: a divisor of `count`.
  """
  grad_fn = jax.grad(loss_fn, has_aux=True)
  # Interleaved for the reason of `map_parts`.
  rows = jnp.arange(count).reshape(-1, micro_batches).T
  if micro_batches == 1:
    return grad_fn(params, rows[0])

  def add(total: Tree, row: jax.Array) -> tuple[Tree, Tree]:
    grads, parts = grad_fn(params, row)
    return jax.tree.map(jnp.add, total, grads), parts

  total, parts = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), rows)
  return jax.tree.map(lambda g: g / micro_batches, total), jax.tree.map(jnp.mean, parts)
