import numpy as np

from rtdmd_jax.pretrain.contrastive import _lookalike_batches, contrastive_loss, lookalikes
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


def test_spoiled_images_are_wrong_answers_for_texts_alone():
  text, image = np.eye(4)[:2], np.eye(4)[:2]
  same = np.eye(2)
  plain, _ = contrastive_loss(text, image, 3.0, same)
  spoiled, accuracy = contrastive_loss(text, image, 3.0, same, np.eye(4)[:1])
  # The first text has a second image as good as its own, the second text one more that is not.
  rows = [np.log(2 + np.exp(-3)), np.log(1 + 2 * np.exp(-3))]
  columns = np.log(1 + np.exp(-3))
  np.testing.assert_allclose(plain, columns, rtol=1e-6)
  np.testing.assert_allclose(spoiled, 0.5 * (np.mean(rows) + columns), rtol=1e-6)
  assert accuracy == 1.0
