import numpy as np
import pytest

from rtdmd_jax.datasets.relations import direction, relations


@pytest.mark.parametrize(
  ("box", "expected"),
  [
    ((0, 20, 10, 30), {"left of"}),
    ((40, 20, 50, 30), {"right of"}),
    ((20, 0, 30, 10), {"above"}),
    ((20, 40, 30, 50), {"below"}),
    ((0, 0, 10, 10), {"left of", "above"}),
    ((21, 21, 31, 31), set()),
    ((20, 20, 30, 30), set()),
  ],
)
def test_relations_to_a_centred_box(box, expected):
  assert relations(box, (20, 20, 30, 30)) == expected


def test_direction_by_hand():
  # centres (5, 5) and (25, 15): offset (-20, -10), extents 10 + 10 each way, shrunk by 2.
  expected = np.array([-18.0, -8.0]) / np.sqrt(500)
  np.testing.assert_allclose(direction((0, 0, 10, 10), (20, 10, 30, 20)), expected)


def test_direction_is_vectorised():
  boxes = np.array([[0, 0, 10, 10], [20, 0, 30, 10]], float)
  both = direction(boxes, boxes[::-1])
  np.testing.assert_allclose(both[0], direction(boxes[0], boxes[1]))
  np.testing.assert_allclose(both[1], -both[0])
