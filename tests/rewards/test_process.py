"""Rewards that misbehave in the process that they share with the run."""

import logging
import os
import signal
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest

from rtdmd_jax import rewards
from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.outputs import checked_outputs

HERE = __name__
CALM = f"{HERE}:Calm"
IMAGES = np.full((3, 4, 4, 3), 7, np.uint8)
PROMPTS = ["a", "bb", "ccc"]


def records():
  return [{"prompt": p, "include": [{"class": p}]} for p in PROMPTS]


def Calm():
  """Sees that its inputs are those of the batch."""

  def score(images, prompts, metadata):
    assert (images == 7).all() and prompts == PROMPTS and metadata == records()
    return [len(prompt) for prompt in prompts]

  return score


def _does(deed):
  def make():
    def score(images, prompts, metadata):
      deed(images, prompts, metadata)
      return np.zeros(len(images))

    return score

  return make


def _prompts_and_records(images, prompts, metadata):
  prompts[0] = "mine"
  metadata[1]["include"].append("mine")
  metadata.pop()


def _settings(images, prompts, metadata):
  os.chdir("/")
  warnings.simplefilter("error")
  logging.getLogger().setLevel(logging.CRITICAL + 1)
  logging.disable(logging.CRITICAL)
  jax.config.update("jax_debug_nans", True)
  np.random.seed(0)


def _prints(images, prompts, metadata):
  for _ in range(1000):
    print("a long line" * 10)
  sys.stdout.close()


def _leaves(images, prompts, metadata):
  sys.exit(3)


def _interrupts(images, prompts, metadata):
  raise KeyboardInterrupt


def _writes(images, prompts, metadata):
  images[0] = 0


def _own_kind(images, prompts, metadata):
  raise type("Odd", (BaseException,), {})("two\nlines")


Greedy, Reckless, Loud = map(_does, (_prompts_and_records, _settings, _prints))
Leaves, Interrupts, Writes, Odd = map(_does, (_leaves, _interrupts, _writes, _own_kind))


@pytest.mark.parametrize("name", ["Greedy", "Reckless", "Loud"])
def test_what_one_reward_does_reaches_no_other_and_not_the_run(name, caplog, capfd, monkeypatch):
  monkeypatch.chdir(os.path.dirname(__file__))
  folder, level, filters = os.getcwd(), logging.getLogger().level, list(warnings.filters)
  scorer = rewards.make({f"{HERE}:{name}": 1.0, CALM: 1.0})
  given = records()
  for _ in range(2):
    scores = scorer(IMAGES, list(PROMPTS), given)
    np.testing.assert_array_equal(scores[CALM], [1, 2, 3])
  assert given == records()
  assert os.getcwd() == folder and logging.getLogger().level == level
  assert logging.getLogger().manager.disable == 0 and list(warnings.filters) == filters
  assert not jax.config.jax_debug_nans
  print("still here")
  shown = capfd.readouterr().out
  assert shown.endswith("still here\n") and len(shown) < 5000
  if name == "Reckless":
    assert "changed jax_debug_nans, the working directory; it is put back" in caplog.text


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("Leaves", "SystemExit: 3"),
    ("Interrupts", "KeyboardInterrupt"),
    ("Writes", "ValueError: .*read-only"),
    ("Odd", "Odd: two lines"),
  ],
)
def test_whatever_is_raised_is_one_sentence_and_costs_an_evaluation_one_score(name, said):
  name = f"{HERE}:{name}"
  with pytest.raises(UserError, match=f"reward '{name}' failed: .*{said}") as error:
    rewards.make({name: 1.0, CALM: 1.0})(IMAGES, PROMPTS, records())
  assert "\n" not in str(error.value)
  found = rewards.make({CALM: 1.0, name: 1.0}).isolated(IMAGES, PROMPTS, records())
  assert found.failed(name) == 3 and found.failed(CALM) == 0
  assert said.partition(":")[0] in found.reasons[name]


@pytest.mark.parametrize(
  "result",
  [None, 1.0, "abc", ["a", "b", "c"], [1.0], [[1.0]] * 3, [1, [2], 3], object(), {}, {"x": 1}]
  + [np.zeros(3, complex), np.array(["1", "2", "3"]), iter([1, 2, 3]), {"r": [0] * 3, "s": "x"}],
  ids=lambda value: type(value).__name__,
)
def test_whatever_is_returned_is_named(result):
  with pytest.raises(ValueError, match="reward 'r'") as error:
    checked_outputs("r", result, 3)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "result",
  [[1, 2, 3], (1, 2, 3), np.arange(1, 4), np.array([1, 2, 3], object), [True, 2, 3], [1, 2.0, 3]],
  ids=lambda value: type(value).__name__,
)
def test_numbers_of_any_kind_are_scores(result):
  np.testing.assert_array_equal(checked_outputs("r", result, 3)["r"], [1, 2, 3])
  assert np.isnan(checked_outputs("r", [None, 1, 2], 3)["r"][0])


def Raises():
  raise LookupError("no key")


def Exits():
  sys.exit("no licence")


def Nothing():
  return None


def Installs():
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  os.chdir("/")
  return lambda images, prompts, metadata: np.zeros(len(images))


@pytest.mark.parametrize(
  ("name", "said"),
  [("Raises", "LookupError: no key"), ("Exits", "SystemExit: no licence"), ("Nothing", "NoneType")],
)
def test_a_reward_that_is_not_built_is_one_sentence(name, said):
  with pytest.raises(UserError, match=said):
    rewards.make({f"{HERE}:{name}": 1.0})
  scorer = rewards.make({f"{HERE}:{name}": 1.0, CALM: 1.0}, allow_unavailable=True)
  assert said in scorer.unavailable[f"{HERE}:{name}"] and list(scorer.rewards) == [CALM]


def test_signals_stay_the_runs(monkeypatch):
  monkeypatch.chdir(os.path.dirname(__file__))
  before, folder = signal.getsignal(signal.SIGTERM), os.getcwd()
  rewards.make({f"{HERE}:Installs": 1.0})
  assert signal.getsignal(signal.SIGTERM) is before and os.getcwd() == folder


@pytest.mark.parametrize("line", ["import sys; sys.exit(1)", "1 / 0", "raise KeyError('x')", "(("])
def test_a_module_that_fails_is_one_sentence(line, tmp_path, monkeypatch):
  (tmp_path / "faulty_reward.py").write_text(line)
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(UserError, match="cannot import 'faulty_reward:make'"):
    rewards.make({"faulty_reward:make": 1.0})


def test_a_thread_of_a_reward_does_not_keep_the_program(tmp_path):
  code = (
    "import threading, time\nimport numpy as np\nfrom rtdmd_jax import rewards\n"
    "def make():\n"
    "  def score(images, prompts, metadata):\n"
    "    threading.Thread(target=lambda: 1 / 0).start()\n"
    "    return np.ones(len(images))\n"
    "  return score\n"
    "print(rewards.make({'__main__:make': 1.0})(np.zeros((1, 4, 4, 3)), ['a'])['mean'])\n"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0 and done.stdout == "[1.]\n"
