import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtdmd_jax.algo import subgrpo

KEY = jax.random.key(7)


def test_chosen_steps_are_distinct_sorted_and_uniform():
  choose = jax.jit(lambda k: subgrpo.choose_steps(k, num_train_steps=2, range_start=1, range_end=3))
  draws = np.asarray(jax.vmap(choose)(jax.random.split(KEY, 3000)))
  assert np.all(draws[:, 0] < draws[:, 1])
  pairs, counts = np.unique(draws, axis=0, return_counts=True)
  np.testing.assert_array_equal(pairs, [[1, 2], [1, 3], [2, 3]])
  np.testing.assert_allclose(counts / 3000, 1 / 3, atol=0.04)
  with pytest.raises(ValueError, match="0..2"):
    subgrpo.choose_steps(KEY, num_train_steps=4, range_start=0, range_end=2)


def noise_of(indices, prompts, chosen=(0, 2), key=KEY):
  return subgrpo.step_noise(
    key, jnp.array(indices), jnp.array(prompts), jnp.array(chosen), steps=4, shape=(3, 2)
  )


def test_only_unchosen_steps_share_noise_within_a_prompt():
  z = noise_of([0, 1, 2, 3], [5, 5, 9, 5])
  assert z.shape == (4, 4, 3, 2)
  for step in (1, 3):
    np.testing.assert_array_equal(z[step, 0], z[step, 1])
    np.testing.assert_array_equal(z[step, 0], z[step, 3])
    assert not np.any(z[step, 0] == z[step, 2])
  for step in (0, 2):
    flat = np.asarray(z[step]).reshape(4, -1)
    assert len(np.unique(flat)) == flat.size
  assert not np.any(z[1] == z[3])


def test_noise_does_not_depend_on_batch_order_or_placement():
  z = noise_of([0, 1, 2, 3], [5, 5, 9, 5])
  np.testing.assert_array_equal(noise_of([3, 2], [5, 9]), z[:, jnp.array([3, 2])])
  # A sample and a prompt of equal number have independent streams, and epochs differ.
  assert not np.any(noise_of([5], [5], chosen=(1,))[1] == noise_of([5], [5], chosen=(0,))[1])
  assert not np.any(z == noise_of([0, 1, 2, 3], [5, 5, 9, 5], key=jax.random.key(8)))


def test_sample_noise_is_standard_normal_per_index():
  z = subgrpo.sample_noise(KEY, jnp.arange(64), (8, 8, 4))
  assert abs(float(z.mean())) < 0.03 and float(z.std()) == pytest.approx(1, abs=0.03)
  np.testing.assert_array_equal(subgrpo.sample_noise(KEY, jnp.array([17]), (8, 8, 4))[0], z[17])


def test_subset_factor():
  assert subgrpo.subset_factor(4, 2) == 1.5
