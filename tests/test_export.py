import jax
import numpy as np
import pytest
import toy

from rtdmd_jax.export import stack_adapters


def test_stacked_adapters_add_what_both_add():
  one, two = {"layer": toy.adapters(1)}, {"layer": toy.adapters(2)}
  both = stack_adapters(one, two)["layer"]
  assert both["a"].shape == (3, 2 * toy.RANK)
  delta = sum(tree["layer"]["a"] @ tree["layer"]["b"] for tree in (one, two))
  np.testing.assert_allclose(both["a"] @ both["b"], delta, atol=1e-6)


def test_one_side_may_be_empty():
  tree = {"layer": toy.adapters(1)}
  jax.tree.map(np.testing.assert_array_equal, stack_adapters({}, tree), tree)


def test_different_modules_are_refused():
  with pytest.raises(ValueError, match="different modules"):
    stack_adapters({"one": toy.adapters(1)}, {"two": toy.adapters(2)})
