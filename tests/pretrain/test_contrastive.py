import jax.numpy as jnp
import numpy as np

from rtdmd_jax.pretrain.contrastive import caption_loss

TEXT = jnp.eye(3)


def test_an_image_is_compared_with_every_caption():
  image = jnp.array([[0.6, 0.8, 0.0], [0.0, 0.6, 0.8]])
  loss, accuracy = caption_loss(TEXT, image, 5.0, jnp.array([1, 1]))
  weights = np.exp(5.0 * np.asarray(image))
  expected = -np.log(weights[:, 1] / weights.sum(1)).mean()
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert accuracy == 0.5
