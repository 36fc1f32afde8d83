"""The service alone: its pages, its limits, and its command line."""

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from rtdmd_jax import cli
from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.remote import protocol
from rtdmd_jax.rewards.serve import __main__ as serve
from rtdmd_jax.rewards.serve.service import Limits
from tests.support.paths import ROOT
from tests.support.reward_faults import number, numbered, serving

TOKEN = "correct horse battery"


def ask(server, path, body=None, headers=()):
  """Status and decoded answer."""
  connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
  if isinstance(body, dict):
    body = json.dumps(body)
  connection.request("GET" if body is None else "POST", path, body=body, headers=dict(headers))
  response = connection.getresponse()
  data = response.read()
  if response.getheader("Content-Type") == "application/json":
    data = json.loads(data)
  return response.status, data


def entry(image, reward="ocr", text="", metadata=None):
  return protocol.request(text, protocol.encode_image(image), reward, metadata)


def entries(count, **options):
  return {"requests": [entry(image, **options) for image in numbered(count)]}


def test_scores_follow_the_protocol():
  def both(images, prompts, metadata):
    return {"geneval": number(images, prompts, metadata), "accuracy": np.ones(len(images))}

  body = entries(3)
  body["requests"][1]["required_rewards"] = ["geneval", "ocr", "ocr"]
  with serving({"ocr": number, "geneval": both}) as server:
    status, answer = ask(server, "/score", body)
  assert status == 200
  assert answer == {
    "results": [
      {"ocr": {"ocr": 0.5}},
      {"ocr": {"ocr": 1.5}, "geneval": {"geneval": 1.5, "accuracy": 1.0}},
      {"ocr": {"ocr": 2.5}},
    ],
    "errors": [{}, {}, {}],
  }


def test_only_the_last_turn_counts():
  body = entries(2)
  first, last = (request["history"][0] for request in body["requests"])
  body = {"requests": [{"history": [first, last], "required_rewards": ["ocr"]}]}
  with serving({"ocr": number}) as server:
    assert ask(server, "/score", body)[1]["results"] == [{"ocr": {"ocr": 1.5}}]


def test_pages():
  with serving({"ocr": number, "hpsv3": number}) as server:
    assert ask(server, "/rewards") == (200, {"rewards": ["ocr", "hpsv3"]})
    states = {"ocr": ["ready"], "hpsv3": ["ready"]}
    assert ask(server, "/health") == (200, {"status": "ok", "rewards": states})
    assert ask(server, "/nothing")[0] == 404 and ask(server, "/", {})[0] == 404
    ask(server, "/score", entries(3))
    status, page = ask(server, "/metrics")
  lines = page.decode().splitlines()
  assert status == 200
  assert 'rtdmd_reward_images_total{reward="ocr"} 3' in lines
  assert 'rtdmd_reward_failed_images_total{reward="ocr"} 0' in lines
  assert 'rtdmd_reward_requests_total{status="200"} 3' in lines
  assert 'rtdmd_reward_requests_total{status="404"} 2' in lines
  assert lines.count("# TYPE rtdmd_reward_requests_total counter") == 1
  for line in lines:
    assert re.fullmatch(r'# TYPE \w+ counter|\w+\{\w+="\w+"\} [\d.e+-]+', line), line


def test_the_token_guards_all_but_health():
  right, wrong = ({"Authorization": f"Bearer {t}"} for t in (TOKEN, TOKEN[:-1]))
  with serving({"ocr": number}, token=TOKEN) as server:
    assert ask(server, "/health")[0] == 200
    for headers in ((), wrong, {"Authorization": TOKEN}, {"Authorization": "Bearer \xe9"}):
      for path, body in (("/rewards", None), ("/metrics", None), ("/score", entries(1))):
        assert ask(server, path, body, headers)[0] == 401
    assert ask(server, "/metrics", headers=right)[0] == 200
    assert ask(server, "/score", entries(1), right)[0] == 200


@pytest.mark.parametrize(
  ("body", "status", "word"),
  [
    ("{", 400, "not JSON"),
    ("[" * 100_000, 400, "not JSON"),
    ("[]", 422, "requests"),
    ({"requests": {}}, 422, "requests"),
    ({"requests": [1]}, 422, r"requests\[0\]"),
    ({"requests": [{"history": []}]}, 422, "history"),
    ({"requests": [{"history": [{"text": "a"}]}]}, 422, "image_b64"),
    ({"requests": [{"history": [{"text": 1, "image_b64": ""}]}]}, 422, "text"),
    ({"requests": [entry(numbered(1)[0], reward="hpsv3")]}, 422, "unknown reward 'hpsv3'.*ocr"),
    ({"requests": [entry(numbered(1)[0]) | {"required_rewards": [["ocr"]]}]}, 422, "unknown"),
    ({"requests": [entry(numbered(1)[0]) | {"metadata": []}]}, 422, "metadata"),
    (entries(5), 413, "5 images, but at most 4"),
    ({"requests": [], "padding": " " * 20_000}, 413, "20029 bytes|at most 16384"),
  ],
)
def test_malformed_and_oversized_requests_are_refused(body, status, word):
  with serving({"ocr": number}, limits=Limits(body=1 << 17, images=4)) as server:
    if isinstance(body, dict) and "padding" in body:
      server.service.limits = Limits(body=1 << 14)
    found, answer = ask(server, "/score", body)
    assert found == status and re.search(word, answer["error"]), answer
    assert ask(server, "/score", entries(1))[0] == 200


def test_a_body_without_length_is_refused():
  with serving({"ocr": number}) as server:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as sock:
      sock.sendall(b"POST /score HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
      assert b" 411 " in sock.recv(1000)


def test_a_client_that_stalls_is_given_up_and_costs_nobody():
  with serving({"ocr": number}, limits=Limits(idle=0.3)) as server:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as sock:
      sock.sendall(b"POST /score HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{")
      assert ask(server, "/score", entries(1))[0] == 200
      assert not re.search(b"200", sock.recv(1000))


def test_more_requests_than_slots_are_told_to_come_back():
  with serving({"ocr": number}, limits=Limits(requests=1)) as server:
    server.slots.acquire()
    assert ask(server, "/score", entries(1))[0] == 503
    server.slots.release()
    assert ask(server, "/score", entries(1))[0] == 200


def png(width, height):
  buffer = io.BytesIO()
  Image.new("1", (width, height)).save(buffer, format="PNG")
  return base64.b64encode(buffer.getvalue()).decode()


def gif():
  buffer = io.BytesIO()
  Image.new("L", (4, 4)).save(buffer, format="GIF")
  return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
  ("image", "word"),
  [
    ("???", "no readable image"),
    ("", "no readable image"),
    (base64.b64encode(b"\x89PNG\r\n\x1a\n").decode(), "no readable image"),
    (protocol.encode_image(numbered(1)[0])[:-40], "no readable image"),
    (gif(), "no readable image"),
    (png(5000, 5000), "more than 16777216 pixels"),
    (png(20_000, 20_000), "no readable image"),  # 48 kB that would unpack to 1.2 GB
  ],
)
def test_a_bad_image_costs_only_itself(image, word):
  body = entries(3)
  body["requests"][1]["history"][0]["image_b64"] = image
  with serving({"ocr": number}) as server:
    status, answer = ask(server, "/score", body)
  assert status == 200
  assert answer["results"] == [{"ocr": {"ocr": 0.5}}, {}, {"ocr": {"ocr": 2.5}}]
  assert word in answer["errors"][1]["ocr"] and answer["errors"][::2] == [{}, {}]


def test_images_of_several_sizes_and_modes():
  buffer = io.BytesIO()
  Image.new("RGBA", (5, 9), (7, 0, 0, 255)).save(buffer, format="PNG")
  body = entries(2)
  body["requests"].insert(1, entry(numbered(4, size=16)[3]))
  body["requests"].append(entry(numbered(1)[0]))
  body["requests"][3]["history"][0]["image_b64"] = base64.b64encode(buffer.getvalue()).decode()
  with serving({"ocr": number}) as server:
    results = ask(server, "/score", body)[1]["results"]
  assert [r["ocr"]["ocr"] for r in results] == [0.5, 3.5, 1.5, 7.5]


def test_a_bad_record_costs_only_its_image_and_a_crash_only_its_reward(caplog):
  def strict(images, prompts, metadata):
    if any("tag" not in record for record in metadata):
      raise UserError("a record has no tag")
    return number(images, prompts, metadata)

  def broken(images, prompts, metadata):
    raise RuntimeError("no memory")

  body = entries(3, metadata={"tag": "colors"})
  body["requests"][1]["metadata"] = None
  for request in body["requests"]:
    request["required_rewards"] = ["geneval", "hpsv3"]
  with serving({"geneval": strict, "hpsv3": broken}) as server:
    status, answer = ask(server, "/score", body)
  assert status == 200
  assert answer["results"] == [{"geneval": {"geneval": 0.5}}, {}, {"geneval": {"geneval": 2.5}}]
  assert answer["errors"][1]["geneval"] == "a record has no tag"
  assert all(e["hpsv3"] == "RuntimeError: no memory" for e in answer["errors"])
  assert "reward hpsv3 failed on 3 images" in caplog.text


def run(*flags):
  return cli.run(serve.main, ["serve", *flags], define_flags=serve.define_flags)


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ([], ["--rewards", "--config"]),
    (["--rewards=genevl"], ["genevl", "geneval"]),
    (["--rewards=geneval"], ["geneval", "detector"]),
    (["--rewards=ocr", "--option=ocr.workers"], ["NAME.KEY=VALUE"]),
    (["--rewards=ocr", "--option=geneval.detector=shapes"], ["geneval.detector", "ocr"]),
    (["--rewards=ocr", "--option=ocr.wokers=1"], ["wokers"]),
    (["--rewards=ocr", "--host=0.0.0.0"], ["0.0.0.0", "--token_env"]),
    (["--rewards=ocr", "--host=0.0.0.0", "--token_env=SHORT"], ["SHORT", "16"]),
    (["--rewards=ocr", "--host=::", "--token_env=UNSET_TOKEN"], ["UNSET_TOKEN"]),
    (["--rewards=ocr", "--port=-1"], ["port"]),
    (["--config=configs/absent.py"], ["absent.py"]),
  ],
)
def test_mistakes_on_the_command_line(flags, words, capsys, monkeypatch):
  monkeypatch.setenv("SHORT", "secret")
  monkeypatch.delenv("UNSET_TOKEN", raising=False)
  assert run(*flags) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ") and error.count("\n") == 1, error
  for word in words:
    assert word in error, error


def test_a_port_in_use(capsys):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    flags = ["--rewards=geneval", "--option=geneval.detector=shapes", f"--port={port}"]
    assert run(*flags) == 2
  assert f"port {port}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_serves_and_ends_cleanly_on_sigterm():
  config = ROOT / "configs/tiny_stage2.py"
  command = [sys.executable, "-m", "rtdmd_jax.rewards.serve", f"--config={config}", "--port=0"]
  command += ["--rewards=geneval", "--token_env=REWARD_TOKEN"]
  environment = os.environ | {"REWARD_TOKEN": TOKEN}
  process = subprocess.Popen(
    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  try:
    line = process.stdout.readline()
    port = int(re.fullmatch(r"serving geneval on http://127.0.0.1:(\d+)\n", line)[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    record = {"tag": "single_object", "include": [{"class": "ring", "count": 1}]}
    body = json.dumps(entries(2, reward="geneval", metadata=record))
    connection.request("POST", "/score", body, {"Authorization": f"Bearer {TOKEN}"})
    answer = json.loads(connection.getresponse().read())
    assert [r["geneval"]["geneval"] for r in answer["results"]] == [0.0, 0.0]
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=30)
  finally:
    process.kill()
  assert process.returncode == 0 and out == "stopped\n", error
  assert TOKEN not in error
