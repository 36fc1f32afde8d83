import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime.metrics import MetricWriter, markdown, read_metrics


def events(workdir):
  """Events of all files: records of length (8 bytes), crc (4), payload, crc (4)."""
  found = []
  for path in sorted((workdir / "tensorboard").glob("events*")):
    data = path.read_bytes()
    while data:
      length = int.from_bytes(data[:8], "little")
      found.append(Event.FromString(data[12 : 12 + length]))
      data = data[16 + length :]
  return found


def test_lines_and_events(tmp_path):
  with MetricWriter(tmp_path / "run", resume_step=-1) as writer:
    writer.scalars(1, {"loss": jnp.float32(0.5), "reward/clip": np.float64(2)})
    writer.scalars(2, {"loss": math.nan, "norm": jnp.array([math.inf]), "ok": 3})
    writer.image(2, "preview", np.zeros((4, 6, 3), np.uint8))
    writer.text(0, "config", markdown({"lora.rank": 4, "data.prompts": "a|b"}))
  first, second = read_metrics(tmp_path / "run/metrics.jsonl")
  assert first["step"] == 1 and first["scalars"] == {"loss": 0.5, "reward/clip": 2.0}
  assert "nonfinite" not in first and 0 <= second["time"] - first["time"] < 60
  assert second["scalars"] == {"loss": None, "norm": None, "ok": 3.0}
  assert second["nonfinite"] == ["loss", "norm"]
  summaries = [(e.step, v) for e in events(tmp_path / "run") for v in e.summary.value]
  assert {(step, v.tag) for step, v in summaries} >= {(1, "loss"), (1, "reward/clip"), (2, "ok")}
  (image,) = [v.image for _, v in summaries if v.tag == "preview"]
  assert (image.height, image.width) == (4, 6)
  (text,) = [v.tensor.string_val[0] for _, v in summaries if v.tag.startswith("config")]
  _, *rows = text.decode().splitlines()
  assert rows == ["|---|---|", "| lora.rank | `4` |", "| data.prompts | `a/b` |"]


def test_a_warning_is_a_line_and_a_text_and_goes_with_its_step(tmp_path):
  with MetricWriter(tmp_path, resume_step=-1) as writer:
    writer.warning(2, "a falls")
    writer.warning(3, "b falls")
  texts = [v for e in events(tmp_path) for v in e.summary.value if v.tag.startswith("warning")]
  assert [list(t.tensor.string_val) for t in texts] == [[b"a falls"], [b"b falls"]]
  with MetricWriter(tmp_path, resume_step=2):
    lines = read_metrics(tmp_path / "metrics.jsonl")
  assert [(line["step"], line["warning"]) for line in lines] == [(2, "a falls")]


def test_resume_drops_what_came_later(tmp_path):
  with MetricWriter(tmp_path, resume_step=-1) as writer:
    for step in range(6):
      writer.scalars(step, {"loss": step})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 6, "ti')  # killed while writing
  with MetricWriter(tmp_path, resume_step=3) as writer:
    writer.scalars(4, {"loss": 40})
  lines = read_metrics(tmp_path / "metrics.jsonl")
  assert [(line["step"], line["scalars"]["loss"]) for line in lines] == [
    *((step, step) for step in range(4)),
    (4, 40),
  ]
  starts = [e.step for e in events(tmp_path) if e.session_log.status]
  assert starts[-1] == 4  # TensorBoard hides older events from this step on
  with MetricWriter(tmp_path, resume_step=-1):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_inactive_writes_nothing(tmp_path):
  with MetricWriter(tmp_path / "run", resume_step=-1, active=False) as writer:
    writer.scalars(1, {"loss": 1})
    writer.image(1, "x", np.zeros((1, 1, 3), np.uint8))
    writer.text(1, "x", "y")
    writer.warning(1, "z")
  assert not (tmp_path / "run").exists()


def test_errors(tmp_path):
  with MetricWriter(tmp_path, resume_step=-1) as writer:
    with pytest.raises(ValueError, match=r"metric loss must be a scalar, has shape \(2,\)"):
      writer.scalars(1, {"loss": np.zeros(2)})
    with pytest.raises(ValueError, match="need uint8"):
      writer.image(1, "x", np.zeros((4, 6, 3)))
  (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "time": 0}) + "\nbroken\n")
  with pytest.raises(UserError, match="metrics.jsonl, line 2: is not a line of metrics"):
    read_metrics(tmp_path / "metrics.jsonl")
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="metrics cannot be written"):
    MetricWriter(tmp_path / "file/run", resume_step=-1)
  with pytest.raises(UserError, match="cannot be read"):
    read_metrics(tmp_path / "absent.jsonl")
