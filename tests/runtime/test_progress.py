import io
import re

import pytest

from rtdmd_jax.runtime import progress
from rtdmd_jax.runtime.progress import Progress, Rate, Trend, format_seconds


class Terminal(io.StringIO):
  def isatty(self):
    return True


def clock(times):
  return iter(times).__next__


def test_plain_lines_are_periodic():
  stream = io.StringIO()
  times = [100, 102, 104, 131, 133, 135]
  with Progress(6, stream=stream, every_seconds=30, clock=clock(times)) as shown:
    for step in range(1, 7):
      shown.update(step, 8, {"loss": step / 3, "reward/clip": 0.25})
  lines = stream.getvalue().splitlines()
  assert [line.split(" | ")[0] for line in lines] == ["step 1/6", "step 4/6", "step 6/6"]
  assert "left" not in lines[0] and "steps/s" not in lines[0]  # compilation says nothing of speed
  assert "21s left | loss 1.333 | reward/clip 0.25" in lines[1]
  assert "steps/s 0.143 | images/s 1.143" in lines[2]
  assert re.search(r"host memory \d+\.\d\d GiB", lines[0])


def test_terminal_shows_bar_metrics_and_time():
  stream = Terminal()
  with Progress(40, start_step=10, stream=stream, clock=clock([0.0, 2.0])) as shown:
    shown.update(11, 4, {"loss": 0.125})
    shown.update(12, 4, {"loss": 0.0625})
  text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
  for part in ("12/40", "56s left", "0.0625", "images/s", "host memory"):
    assert part in text


def test_rate_forgets_the_distant_past():
  rate = Rate(0, window=2)
  for now, step in ((0, 1), (100, 2), (101, 3), (102, 5)):
    rate.update(now, step, 10, 0.5)
  assert rate.per_second() == (1.5, 10.0, 0.5)
  with pytest.raises(ValueError, match="does not follow"):
    rate.update(103, 5, 1)


@pytest.mark.parametrize(
  "options, words",
  [
    ({}, "TFLOP/s 1.5 |"),
    ({"peak_tflops": 6.0}, "TFLOP/s 1.5 | MFU 25.0% |"),
    ({"peak_tflops": 6.0, "recomputes": True}, "TFLOP/s 1.5 | HFU 25.0% |"),
  ],
)
def test_share_of_the_peak(options, words):
  stream = io.StringIO()
  with Progress(2, stream=stream, every_seconds=0, clock=clock([0.0, 2.0]), **options) as shown:
    shown.update(1, 4, {}, 9.0)
    shown.update(2, 4, {}, 3.0)
  first, second = stream.getvalue().splitlines()
  assert words in second and "TFLOP" not in first


def test_trends():
  noise = [0.1, -0.2, 0.15, -0.05] * 5
  trend = Trend()
  assert [trend.update(v) for v in noise][6:] == [""] + ["steady"] * 13
  for slope, name in ((0.1, "rising"), (-0.1, "falling")):
    trend = Trend()
    assert [trend.update(slope * i + v) for i, v in enumerate(noise)][-1] == name
    assert trend.update(float("nan")) == name  # and does not poison what follows
    assert trend.update(slope * 21) == name
  # What lies further back than the window is forgotten.
  assert [trend.update(5.0 + v) for v in noise + noise][-1] == "steady"


def test_lines_show_trends_of_losses_and_rewards():
  stream, times = io.StringIO(), [float(i) for i in range(10)]
  with Progress(10, stream=stream, every_seconds=0, clock=clock(times)) as shown:
    for step in range(1, 11):
      shown.update(step, 8, {"loss/policy": -step, "reward/clip": step, "ratio/drift": step})
  first, *_, last = stream.getvalue().splitlines()
  assert "loss/policy -10 falling | reward/clip 10 rising | ratio/drift 10 |" in last
  assert "loss/policy -1 | reward/clip 1 |" in first


def test_device_memory(monkeypatch):
  class Device:
    def memory_stats(self):
      return {"bytes_in_use": 2**30, "peak_bytes_in_use": 3 * 2**30, "bytes_limit": 2**33}

  monkeypatch.setattr("jax.local_devices", lambda: [Device()])
  assert progress.memory()["device memory"] == "1.00 (peak 3.00) of 8.00 GiB"


@pytest.mark.parametrize(
  "seconds, text", [(7.4, "7s"), (306, "5m 06s"), (11040, "3h 04m"), (93700, "1d 02h"), (-1, "0s")]
)
def test_format_seconds(seconds, text):
  assert format_seconds(seconds) == text
