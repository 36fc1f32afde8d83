"""Metrics of micro-batches: each says how it combines into one of the whole batch.

They are `clu.metrics`. A micro-batch in which no sample has signal is not computed: `skipped` is
what it contributes.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from clu import metrics


@flax.struct.dataclass
class LossAverage(metrics.Average):
  """The mean of a loss over all micro-batches; one that is not computed has the loss 0."""

  @classmethod
  def skipped(cls) -> "LossAverage":
    """The loss of a micro-batch that is not computed."""
    return cls(total=jnp.zeros((), jnp.float32), count=jnp.ones((), jnp.int32))


@flax.struct.dataclass
class ComputedAverage(metrics.Average):
  """The mean of a statistic over the samples whose micro-batches are computed."""

  @classmethod
  def skipped(cls) -> "ComputedAverage":
    """Nothing: the samples have no statistic."""
    return cls.empty()


@flax.struct.dataclass
class Maximum(metrics.Metric):
  """The largest of values from 0."""

  value: jax.Array

  @classmethod
  def empty(cls) -> "Maximum":
    """The maximum of nothing."""
    return cls(jnp.zeros((), jnp.float32))

  skipped = empty

  @classmethod
  def from_model_output(cls, values: jax.Array, **_: Any) -> "Maximum":
    """The largest of `values`."""
    return cls(jnp.max(values))

  def merge(self, other: "Maximum") -> "Maximum":
    """The larger one; a NaN stays."""
    return type(self)(jnp.maximum(self.value, other.value))

  def compute(self) -> jax.Array:
    """The maximum."""
    return self.value
