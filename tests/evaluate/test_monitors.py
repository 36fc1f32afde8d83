import numpy as np
import pytest

from rtdmd_jax.evaluate.monitors import Monitor, image_values, moves


@pytest.mark.parametrize(
  ("trained", "watched", "bad"),
  [
    (0.9, 0.1, ["eval/other"]),  # one rises, the other falls
    (0.9, 0.45, []),  # the fall is within the intervals
    (0.9, 0.9, []),  # both rise
  ],
)
def test_what_moved(trained, watched, bad):
  first = {"eval/reward": (0.5, 0.1), "eval/other": (0.5, 0.1)}
  now = {"eval/reward": (trained, 0.1), "eval/other": (watched, 0.1), "eval/new": (0.0, 0.0)}
  assert moves(first, now, ["eval/reward"]) == (["eval/reward"], bad)


def _values(reward, dark, entropy):
  def around(mean):
    return mean + 0.01 * np.array([-1, 1, -1, 1])

  return {
    "eval/reward": around(reward),
    "images/dark_share": around(dark),
    "images/colour_entropy": around(entropy),
  }


def test_a_run_is_compared_with_its_first_evaluation_also_when_resumed(tmp_path):
  file = tmp_path / "monitor.json"
  assert Monitor(file, ["reward"]).look(0, _values(0.5, 0.2, 3.0)) is None
  monitor = Monitor(file, ["reward"])
  assert monitor.look(10, _values(0.5, 0.8, 3.0)) is None  # nothing trained rose
  assert monitor.look(20, _values(0.8, 0.1, 3.5)) is None  # everything became better
  said = monitor.look(30, _values(0.8, 0.7, 2.0))
  assert said.startswith("step 30: reward hacking? Since step 0 eval/reward rose from 0.5 to 0.8,")
  assert "images/dark_share rose from 0.2 to 0.7" in said
  assert "images/colour_entropy fell from 3 to 2" in said


def test_a_reward_that_failed_everywhere_says_nothing(tmp_path):
  monitor = Monitor(tmp_path / "monitor.json", ["reward"])
  nan = np.full(4, np.nan)
  assert monitor.look(0, _values(0.5, 0.2, 3.0) | {"eval/other": nan}) is None
  assert monitor.look(1, _values(0.9, 0.2, 3.0) | {"eval/other": nan}) is None


def test_values_of_images():
  images = np.zeros((3, 4, 4, 3), np.uint8)
  groups = np.stack([images[:2], np.stack([images[0], images[0] + 255])])
  values = image_values(images, groups)
  np.testing.assert_array_equal(values["images/dark_share"], [1, 1, 1])
  np.testing.assert_array_equal(values["images/diversity"], [0, 1])
