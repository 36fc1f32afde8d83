import numpy as np
import pytest

from rtdmd_jax.datasets.geneval_records import TAGS
from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.host.geneval import Detection, GenEval, check_record, confident, judge

LEFT, RIGHT, FAR_RIGHT = (0, 20, 10, 30), (40, 20, 50, 30), (54, 20, 60, 30)


def found(name, box=LEFT, score=0.99, color=None):
  return Detection(name, box, score, color)


def record(tag, *include, exclude=None):
  return {"tag": tag, "include": list(include), "prompt": ""} | (
    {"exclude": exclude} if exclude else {}
  )


def need(name, count=1, **extra):
  return {"class": name, "count": count, **extra}


def test_everything_right_is_one():
  rec = record("color_attr", need("ring", color="red"), need("cross", color="blue"))
  verdict = judge(rec, [found("ring", color="red"), found("cross", color="blue")])
  assert verdict == (1.0, True, True)


def test_missing_object_earns_nothing():
  assert judge(record("single_object", need("ring")), []) == (0.0, False, False)


@pytest.mark.parametrize(("number", "soft"), [(0, 0.0), (1, 0.5), (2, 1.0), (3, 0.5), (5, -0.5)])
def test_count_credit_falls_linearly_and_turns_negative(number, soft):
  verdict = judge(record("counting", need("ring", 2)), [found("ring")] * number)
  assert verdict.soft == soft
  assert verdict.strict == (number == 2)


def test_surplus_passes_the_official_rule_unless_excluded():
  plain = record("counting", need("ring", 2))
  banned = record("counting", need("ring", 2), exclude=[need("ring", 3)])
  three = [found("ring")] * 3
  assert judge(plain, three) == (0.5, False, True)
  assert judge(banned, three) == (0.5, False, False)
  assert judge(banned, three[:2]) == (1.0, True, True)


def test_exclude_does_not_touch_soft_and_strict():
  rec = record("two_object", need("ring"), exclude=[need("cross", 1)])
  assert judge(rec, [found("ring"), found("cross")]) == (1.0, True, False)


def test_wrong_colour_earns_the_count_credit():
  rec = record("colors", need("ring", color="red"))
  assert judge(rec, [found("ring", color="blue")]) == (0.5, False, False)


def test_share_of_right_colours():
  rec = record("colors", need("ring", 2, color="red"))
  verdict = judge(rec, [found("ring", color="red"), found("ring", color="blue")])
  assert verdict.soft == pytest.approx((1.0 + 0.5) / 2)


def test_wrong_count_with_a_colour_adds_a_zero():
  rec = record("colors", need("ring", 2, color="red"))
  assert judge(rec, [found("ring", color="red")]).soft == pytest.approx((0.5 + 0.0) / 2)


def test_official_judges_the_best_scored_object():
  rec = record("colors", need("ring", color="red"))
  best_red = [found("ring", score=0.5, color="blue"), found("ring", score=0.8, color="red")]
  best_blue = [found("ring", score=0.8, color="blue"), found("ring", score=0.5, color="red")]
  assert judge(rec, best_red).official
  assert not judge(rec, best_blue).official


@pytest.mark.parametrize(
  ("box", "soft", "right"), [(LEFT, 1.0, True), (FAR_RIGHT, (1 + 1 + 0 + 1) / 4, False)]
)
def test_position_and_its_published_extra_credit(box, soft, right):
  rec = record("position", need("cross"), need("ring", position=["left of", 0]))
  verdict = judge(rec, [found("cross", RIGHT), found("ring", box)])
  assert verdict == (pytest.approx(soft), right, right)


def test_position_without_its_target():
  rec = record("position", need("cross"), need("ring", position=["left of", 0]))
  assert judge(rec, [found("ring", LEFT)]) == (pytest.approx((0 + 1 + 0) / 3), False, False)


def test_position_of_a_missing_object():
  rec = record("position", need("cross"), need("ring", position=["left of", 0]))
  assert judge(rec, [found("cross", RIGHT)]) == (pytest.approx((1 + 0 + 0) / 3), False, False)


def test_position_is_not_judged_after_a_wrong_colour():
  rec = record("position", need("cross"), need("ring", color="red", position=["left of", 0]))
  verdict = judge(rec, [found("cross", RIGHT), found("ring", LEFT, color="blue")])
  assert verdict.soft == pytest.approx((1 + 1 + 0) / 3)


def test_one_zero_for_several_failing_pairs():
  rec = record("position", need("cross"), need("ring", 2, position=["left of", 0]))
  verdict = judge(rec, [found("cross", LEFT), found("ring", RIGHT), found("ring", FAR_RIGHT)])
  assert verdict.soft == pytest.approx((1 + 1 + 0 + 1) / 4)


def test_thresholds_by_tag():
  weak, sure = found("ring", score=0.6), found("ring", score=0.95)
  assert confident([weak, sure], "colors")["ring"] == [sure, weak]
  assert confident([weak, sure], "counting")["ring"] == [sure]
  assert confident([found("ring", score=0.3)], "colors")["ring"] == []
  assert len(confident([sure] * 20, "counting")["ring"]) == 16


def _images(count):
  return np.zeros((count, 8, 8, 3), np.uint8)


def test_scorer_outputs_per_tag():
  scorer = GenEval(lambda images: [[found("ring", color="red")] for _ in images])
  metadata = [
    record("single_object", need("ring")),
    record("colors", need("ring", color="blue")),
  ]
  scores = scorer(_images(2), ["", ""], metadata)
  assert all(v.shape == (2,) and v.dtype == np.float32 for v in scores.values())
  np.testing.assert_array_equal(scores["geneval"], [1.0, 0.5])
  np.testing.assert_array_equal(scores["strict_accuracy"], [1.0, 0.0])
  np.testing.assert_array_equal(scores["single_object_accuracy"], [1.0, -10.0])
  np.testing.assert_array_equal(scores["colors_strict_accuracy"], [-10.0, 0.0])
  assert len(scores) == 3 + 2 * len(TAGS)


def test_scorer_checks_its_input():
  scorer = GenEval(lambda images: [[] for _ in images])
  good = record("single_object", need("ring"))
  with pytest.raises(ValueError, match="uint8"):
    scorer(np.zeros((1, 8, 8, 3), np.float32), [""], [good])
  with pytest.raises(ValueError, match="2 records"):
    scorer(_images(1), [""], [good, good])
  with pytest.raises(UserError, match="got none"):
    scorer(_images(1), [""], None)


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    ({"prompt": "a"}, "'tag' and 'include'"),
    (record("shape", need("ring")), "unknown tag 'shape'"),
    (record("counting", need("ring", 0)), "positive integer"),
    (record("position", need("ring", position=["above", 0])), "does not precede"),
  ],
)
def test_malformed_record_is_a_user_error(bad, message):
  with pytest.raises(UserError, match=message):
    check_record(bad, "train_metadata.jsonl line 3")
