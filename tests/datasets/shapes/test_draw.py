import numpy as np
import pytest

from rtdmd_jax.datasets.relations import relations
from rtdmd_jax.datasets.shapes.draw import PALETTE, SIZE, coverage, draw, inside_distance
from rtdmd_jax.datasets.shapes.grammar import COLORS, SHAPES, TAGS, all_records


def _sample(tag, count=25):
  rng = np.random.default_rng(7)
  records = [r for r in all_records() if r["tag"] == tag]
  for index in rng.integers(len(records), size=count):
    yield records[index], *draw(records[index], rng)


@pytest.mark.parametrize("tag", TAGS)
def test_scene_holds_exactly_the_record(tag):
  for record, image, shapes in _sample(tag):
    assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
    wanted = [need for need in record["include"] for _ in range(need["count"])]
    assert [s.name for s in shapes] == [need["class"] for need in wanted]
    for need, shape in zip(wanted, shapes, strict=True):
      assert shape.color == need.get("color", shape.color) and shape.color in COLORS
      if "position" in need:
        relation, index = need["position"]
        assert relations(shape.box, shapes[index].box) == {relation}


@pytest.mark.parametrize("tag", TAGS)
def test_boxes_lie_inside_and_apart(tag):
  for _, _, shapes in _sample(tag):
    boxes = np.array([s.box for s in shapes])
    assert boxes.min() >= 1 and boxes.max() <= SIZE - 1
    for i, box in enumerate(boxes):
      for other in boxes[:i]:
        apart = np.maximum(box[:2] - other[2:], other[:2] - box[2:])
        assert apart.max() >= 2.9


def test_painted_pixels_lie_in_the_boxes_and_have_the_colour():
  for _, image, shapes in _sample("color_attr"):
    background = image[0, 0].astype(int)
    foreground = np.abs(image.astype(int) - background).max(-1) > 0
    inside = np.zeros_like(foreground)
    for shape in shapes:
      x0, y0, x1, y1 = shape.box
      inside[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = True
      target = np.array(PALETTE[shape.color])
      window = image[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))].astype(int)
      near = np.abs(window - target).max(-1) <= 9
      assert near.mean() > 0.2
    assert not (foreground & ~inside).any()


def test_same_seed_same_scene():
  record = all_records()[-1]
  first, _ = draw(record, np.random.default_rng(3))
  again, _ = draw(record, np.random.default_rng(3))
  other, _ = draw(record, np.random.default_rng(4))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


@pytest.mark.parametrize("name", SHAPES)
def test_shape_touches_all_four_sides_of_its_box(name):
  axis = np.arange(-12, 12) + 0.5
  alpha = coverage(name, axis[None, :], axis[:, None], 10.0)
  rows, columns = np.flatnonzero(alpha.max(1) > 0.2), np.flatnonzero(alpha.max(0) > 0.2)
  assert abs(rows[0] - 2) <= 1 and rows[-1] == 21
  assert columns[0] == 2 and columns[-1] == 21


def test_unknown_shape_is_named():
  with pytest.raises(ValueError, match="'star'"):
    inside_distance("star", np.zeros(1), np.zeros(1), 1.0)


def test_contrast_moves_the_shapes_towards_the_background():
  record = all_records()[0]
  full, shapes = draw(record, np.random.default_rng(3))
  washed, same = draw(record, np.random.default_rng(3), contrast=0.25)
  assert shapes == same
  background = float(full[0, 0, 0])
  np.testing.assert_allclose(washed - background, 0.25 * (full - background), atol=1.0)
