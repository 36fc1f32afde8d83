"""What AdamW of `rtdmd_jax.training.optim` has left of its updates when adapters are bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.adapters.lora import INITS
from rtdmd_jax.training.optim import guarded_update, make_optimizer
from rtdmd_jax.training.settings import OptimizerConfig


def lost_updates(
  rates: tuple[float, ...] = (1e-6, 3e-5, 1e-3),
  *,
  rank: int = 32,
  width: int = 1536,
  updates: int = 200,
) -> dict:
  """Adapters `a` [width, rank] and `b` [rank, width] under gradients with a constant part.

  Each entry's gradient is a constant plus noise of the same deviation, equal for both types.
  `changed` is the share of entries that an update changes, over the second half of the updates;
  `moved` the mean distance from the start to the end, over that of float32.
  """
  keys = jax.random.split(jax.random.key(0), 2)
  start = {
    "a": INITS["gaussian"](rank) * jax.random.normal(keys[0], (width, rank)),
    "b": jnp.zeros((rank, width)),
  }
  constant = {name: jax.random.normal(keys[1], x.shape) for name, x in start.items()}

  def run(rate: float, dtype: jnp.dtype) -> tuple[dict, dict]:
    optimizer = make_optimizer(OptimizerConfig(rate))
    first = jax.tree.map(lambda x: x.astype(dtype), start)

    def update(carry: tuple, key: jax.Array) -> tuple[tuple, dict]:
      params, state = carry
      noise = {n: jax.random.normal(k, x.shape) for (n, x), k in zip(
        constant.items(), jax.random.split(key, 2), strict=True
      )}  # fmt: skip
      gradients = jax.tree.map(lambda c, z: (c + z).astype(dtype), constant, noise)
      new, state, _ = guarded_update(optimizer, gradients, state, params)
      return (new, state), jax.tree.map(lambda x, y: jnp.mean(x != y), new, params)

    keys = jax.random.split(jax.random.key(1), updates)
    (last, _), changed = jax.lax.scan(update, (first, optimizer.init(first)), keys)
    moved = jax.tree.map(
      lambda x, y: float(jnp.mean(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)))),
      last, first,
    )  # fmt: skip
    return {n: float(np.mean(c[updates // 2 :])) for n, c in changed.items()}, moved

  rows = []
  for rate in rates:
    exact, (changed, moved) = run(rate, jnp.float32)[1], run(rate, jnp.bfloat16)
    rows.append({
      "rate": rate, "changed": changed, "moved": {n: moved[n] / exact[n] for n in moved},
    })  # fmt: skip
  return {"rank": rank, "width": width, "updates": updates, "rows": rows}
