import numpy as np

from rtdmd_jax.pretrain.contrastive import _lookalike_batches, lookalikes
from rtdmd_jax.pretrain.data import Scenes

CAPTIONS = [
  "a photo of a red ring and a blue square",
  "a photo of a blue ring and a red square",  # two words exchanged
  "a photo of a red ring and a green square",  # one word changed
  "a photo of a red cross and a green square",
  "a photo of a ring",
]


def test_lookalikes_differ_in_one_word_or_in_the_order_of_two():
  assert lookalikes(CAPTIONS) == [[1, 2], [0], [0, 3], [2], []]


def test_a_batch_holds_groups_of_lookalikes():
  caption = np.arange(50) % 5
  scenes = Scenes(np.zeros((50, 1)), caption, CAPTIONS)
  near = lookalikes(CAPTIONS)
  draw = _lookalike_batches(scenes, 16)
  first = draw(np.random.default_rng(3))
  np.testing.assert_array_equal(first, draw(np.random.default_rng(3)))
  groups = caption[first].reshape(4, 4)
  assert all(set(g[1:]) <= set(near[g[0]] or [g[0]]) for g in groups)
