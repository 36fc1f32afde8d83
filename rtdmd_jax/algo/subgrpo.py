"""SubGRPO (RTDMD, arXiv 2605.26108): train few steps of a rollout, share the others' noise."""

import jax
import jax.numpy as jnp

# Streams folded into the epoch's key, so that a sample and a prompt of equal number differ.
SAMPLE_STREAM = 0
PROMPT_STREAM = 1


def choose_steps(
  key: jax.Array, *, num_train_steps: int, range_start: int, range_end: int
) -> jax.Array:
  """Chooses the steps that an epoch trains, without replacement.

  Args:
    key: the epoch's key, the same on all hosts.
    num_train_steps: M, how many.
    range_start: first candidate index.
    range_end: last candidate index, inclusive.

  Returns:
    [M] int32 ascending.

  Raises:
    ValueError: the range holds fewer than M steps.
  """
  candidates = range_end - range_start + 1
  if not 1 <= num_train_steps <= candidates:
    raise ValueError(f"cannot choose {num_train_steps} of steps {range_start}..{range_end}")
  return jnp.sort(range_start + jax.random.permutation(key, candidates)[:num_train_steps])


def sample_noise(key: jax.Array, indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Standard normal noise as a function of each sample's global index only.

  Args:
    key: the batch's key, the same on all hosts, or one key a sample, [B].
    indices: [B] integers.
    shape: of one sample.

  Returns:
    [B, *shape] float32, independent of the batch's size, order and placement.
  """

  def one_sample(key: jax.Array, index: jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(key, index), shape)

  return jax.vmap(one_sample, in_axes=(0 if key.ndim else None, 0))(key, indices)


def step_noise(
  key: jax.Array,
  indices: jax.Array,
  prompt_ids: jax.Array,
  chosen: jax.Array,
  *,
  steps: int,
  shape: tuple[int, ...],
) -> jax.Array:
  """Noise of every step of a rollout.

  A chosen step's noise is a function of (key, sample index, step); the others' of (key, prompt id,
  step): equal for all repeats of a prompt, wherever they are computed, so that it adds nothing to
  the variance within a group.

  Args:
    key: the epoch's key, the same on all hosts.
    indices: [B] global sample indices.
    prompt_ids: [B] integers.
    chosen: [M] step indices that are trained.
    steps: K.
    shape: of one sample.

  Returns:
    [K, B, *shape] float32.
  """

  def one_step(step: jax.Array) -> jax.Array:
    trained = jnp.any(chosen == step)
    stream = jax.random.fold_in(key, jnp.where(trained, SAMPLE_STREAM, PROMPT_STREAM))
    owner = jnp.where(trained, indices, prompt_ids)
    return sample_noise(jax.random.fold_in(stream, step), owner, shape)

  return jax.vmap(one_step)(jnp.arange(steps))


def subset_factor(steps: int, num_train_steps: int) -> float:
  """`(K - 1) / M`: makes the mean over chosen steps estimate the sum over stochastic steps.

  RTDMD prints it; its code leaves it out, so it is an option of the policy term.
  """
  return (steps - 1) / num_train_steps
