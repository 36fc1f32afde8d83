"""The client and the service together over a real socket, undisturbed and with faults."""

import json
import logging
import random
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from rtdmd_jax import rewards
from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.remote.reward import RemoteReward
from rtdmd_jax.rewards.serve.service import Limits
from tests.support.reward_faults import BODIES, Proxy, number, numbered, running, serving

COUNT = 40
TRUTH = np.arange(COUNT) + 0.5
FAST = {"timeout": 5.0, "backoff": 0.01, "chunk": 4, "concurrency": 4}


def score(reward, count=COUNT):
  return reward(numbered(count), ["a ring"] * count, None)[reward.name]


def through(fault, **options):
  """Scores of COUNT images through a proxy with faults, and the faults it made."""
  with serving({"hpsv3": number}) as server, running(Proxy(server.server_port, fault)) as proxy:
    values = score(RemoteReward("hpsv3", url=proxy.url, **(FAST | options)))
  return values, proxy.faults


@pytest.mark.parametrize(("chunk", "posts"), [(1, 40), (7, 6), (40, 1), (100, 1)])
def test_scores_come_back_in_order_in_chunks(chunk, posts):
  values, faults = through(lambda n: None, chunk=chunk)
  np.testing.assert_array_equal(values, TRUTH)
  assert values.dtype == np.float32 and len(faults) == posts


def test_prompts_records_and_pixels_arrive_as_they_are():
  seen = []

  def spy(images, prompts, metadata):
    seen.append((images, prompts, metadata))
    return {"geneval": np.ones(len(images)), "accuracy": [0.0, 1.0]}

  images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
  records = [{"tag": "colors", "include": [{"class": "ring"}]}, {"tag": "counting"}]
  with serving({"geneval": spy}) as server:
    scorer = rewards.make({"geneval": 2.0}, options={"geneval": {"url": server.url}})
    scores = scorer(images, ['say "é"', "b"], records)
  (sent, prompts, metadata), *more = seen
  np.testing.assert_array_equal(sent, images)
  assert prompts == ['say "é"', "b"] and metadata == records and not more
  np.testing.assert_array_equal(scores["geneval"], [1.0, 1.0])
  np.testing.assert_array_equal(scores["mean"], [2.0, 2.0])
  np.testing.assert_array_equal(scores["accuracy"], [0.0, 1.0])
  assert np.isnan(scores["counting_accuracy"]).all()


def test_jpeg_is_close():
  sent = []
  image = np.stack(np.meshgrid(*[np.arange(0, 256, 8)] * 2), -1).astype(np.uint8)
  image = np.concatenate([image, 128 + 0 * image[..., :1]], -1)[None]

  def spy(images, prompts, metadata):
    sent.append(images)
    return [1.0]

  with serving({"hpsv3": spy}) as server:
    reward = RemoteReward("hpsv3", url=server.url, image_format="jpeg", **FAST)
    reward(image, [""], None)
  difference = np.abs(sent[0].astype(int) - image)
  assert 0 < difference.max() <= 12 and difference.mean() < 2


def test_a_fifth_of_the_requests_dropped():
  values, faults = through(lambda n: "drop" if n % 5 == 4 else None, chunk=1, attempts=10)
  np.testing.assert_array_equal(values, TRUTH)
  # 40 answers need 49 requests, of which 9 are dropped.
  assert (len(faults), faults.count("drop")) == (49, 9)


@pytest.mark.parametrize("fault", ["drop", "cut", "500", *BODIES])
def test_a_fault_that_passes_costs_only_tries(fault):
  values, faults = through(lambda n: fault if n < 10 else None, attempts=11)
  np.testing.assert_array_equal(values, TRUTH)
  assert len(faults) == 20


@pytest.mark.parametrize("fault", ["cut", "short", "html"])
def test_a_fault_that_stays_is_nan_after_the_last_try(fault, caplog):
  values, faults = through(lambda n: fault, attempts=3)
  assert np.isnan(values).all() and len(values) == COUNT
  assert len(faults) == 3 * COUNT / FAST["chunk"]
  assert "reward hpsv3: 4 images failed" in caplog.text


@pytest.mark.parametrize("fault", ["slow", "trickle"])
def test_an_answer_later_than_the_timeout_is_asked_for_again(fault):
  start = time.monotonic()
  values, faults = through(lambda n: fault if n < 2 else None, timeout=0.4)
  np.testing.assert_array_equal(values, TRUTH)
  # Read to its end, each of two trickles would take five seconds.
  assert len(faults) == 12 and time.monotonic() - start < 9.0


def test_all_faults_at_once_never_give_a_wrong_score():
  draw = random.Random(0)
  kinds = ["drop", "cut", "500", *BODIES]
  values, faults = through(
    lambda n: draw.choice(kinds) if draw.random() < 0.5 else None, chunk=1, attempts=2
  )
  failed = np.isnan(values)
  np.testing.assert_array_equal(values[~failed], TRUTH[~failed])
  # Half of the requests fail, so about one image in four fails twice.
  assert 0 < failed.sum() < 3 * COUNT / 4
  assert len(faults) - sum(map(bool, faults)) == COUNT - failed.sum()


def test_one_failed_image_costs_no_other(caplog):
  def picky(images, prompts, metadata):
    return np.where(images[:, 0, 0, 0] % 8 == 3, np.nan, number(images, prompts, metadata))

  with serving({"hpsv3": picky}) as server:
    values = score(RemoteReward("hpsv3", url=server.url, attempts=2, **FAST))
    page = server.service.metrics_page()
  failed = np.arange(COUNT) % 8 == 3
  np.testing.assert_array_equal(np.isnan(values), failed)
  np.testing.assert_array_equal(values[~failed], TRUTH[~failed])
  assert "the image could not be scored" in caplog.text
  # Only what failed was asked for again: 5 images twice.
  assert 'rtdmd_reward_images_total{reward="hpsv3"} 45' in page
  assert 'rtdmd_reward_failed_images_total{reward="hpsv3"} 10' in page


def test_a_service_that_dies_and_returns():
  options = FAST | {"chunk": 1, "attempts": 20, "backoff": 0.05}
  with serving({"hpsv3": number}) as server:
    port = server.server_port
    reward = RemoteReward("hpsv3", url=server.url, **options)
    np.testing.assert_array_equal(score(reward), TRUTH)
  result = []
  thread = threading.Thread(target=lambda: result.append(score(reward)))
  thread.start()
  time.sleep(0.3)
  assert not result
  with serving({"hpsv3": number}, port=port):
    thread.join(30)
  np.testing.assert_array_equal(result[0], TRUTH)


@pytest.mark.parametrize("dead_share", [0.25, 0.75])
def test_training_goes_on_or_stops_as_configured(dead_share, caplog):
  def partly(images, prompts, metadata):
    values = number(images, prompts, metadata)
    return np.where(values < dead_share * COUNT, np.nan, values)

  def make(url, **options):
    return rewards.make(
      {"hpsv3": 2.0}, options={"hpsv3": {"url": url, "attempts": 1, **FAST, **options}}
    )

  images, prompts = numbered(COUNT), [""] * COUNT
  failed = TRUTH < dead_share * COUNT
  with serving({"hpsv3": partly}) as server:
    lenient, default, strict = (
      make(server.url, **o) for o in ({"max_failed": 1.0}, {}, {"max_failed": 0.0})
    )
    with caplog.at_level(logging.WARNING):
      scores = lenient(images, prompts)
    assert f"reward hpsv3 failed on {failed.sum()} of 40 samples" in caplog.text
    np.testing.assert_array_equal(np.isnan(scores["mean"]), failed)
    np.testing.assert_array_equal(scores["mean"][~failed], 2 * TRUTH[~failed])
    with pytest.raises(UserError, match=f"failed on {failed.sum()} of 40 samples.*max_failed of 0"):
      strict(images, prompts)
    if dead_share < 0.5:
      np.testing.assert_array_equal(default(images, prompts)["hpsv3"][~failed], TRUTH[~failed])
    else:
      with pytest.raises(UserError, match="failed on 30 of 40 samples, more than its max_failed"):
        default(images, prompts)
  with pytest.raises(UserError, match="failed on 40 of 40 samples"):
    default(images, prompts)  # the service is gone
  assert np.isnan(lenient(images, prompts)["hpsv3"]).all()


def test_a_service_that_is_not_there_stops_training_and_is_skipped_in_evaluation(caplog):
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  options = {"hpsv3": {"url": f"http://127.0.0.1:{port}", "attempts": 2, "backoff": 0.01}}
  names = {"hpsv3": 1.0, "geneval": 1.0}
  options["geneval"] = {"detector": "shapes"}
  with pytest.raises(UserError, match="'hpsv3' cannot be built.*cannot be reached.*running"):
    rewards.make(names, options=options)
  scorer = rewards.make(names, options=options, allow_unavailable=True)
  assert scorer.weights == {"geneval": 1.0} and "hpsv3 is left out" in caplog.text


def test_the_service_lacks_the_reward():
  with serving({"ocr": number}) as server, pytest.raises(UserError, match="'hpsv3', only ocr"):
    RemoteReward("hpsv3", url=server.url)


def test_the_token_is_read_from_the_environment_and_sent(monkeypatch):
  monkeypatch.setenv("REWARD_TOKEN", "correct horse battery")
  with serving({"hpsv3": number}, token="correct horse battery") as server:
    reward = RemoteReward("hpsv3", url=server.url, token_env="REWARD_TOKEN", **FAST)
    np.testing.assert_array_equal(score(reward), TRUTH)
    with pytest.raises(UserError, match="401.*token_env"):
      RemoteReward("hpsv3", url=server.url)
    monkeypatch.setenv("REWARD_TOKEN", "wrong horse")
    with pytest.raises(UserError, match="401.*token_env"):
      RemoteReward("hpsv3", url=server.url, token_env="REWARD_TOKEN")


def test_a_refused_request_ends_the_run_at_once():
  with serving({"hpsv3": number}, limits=Limits(images=3)) as server:
    reward = RemoteReward("hpsv3", url=server.url, **FAST)
    with pytest.raises(UserError, match="413.*at most 3 in one request.*smaller chunk"):
      score(reward)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"url": "reward.host:80"}, "not of the form"),
    ({"url": "ftp://host"}, "not of the form"),
    ({"url": "http://host:80000"}, "Port out of range"),
    ({"url": "http://me:secret@host"}, "no password"),
    ({"url": "http://h", "token_env": "UNSET_TOKEN"}, "variable UNSET_TOKEN"),
    ({"url": "http://h", "attempts": 0}, "must be positive"),
    ({"url": "http://h", "chunk": 0}, "must be positive"),
    ({"url": "http://h", "image_format": "webp"}, "use png or jpeg"),
    ({"url": "http://h", "timout": 1}, "unexpected keyword argument 'timout'"),
    ({"url": "http://h", "max_failed": 2}, "max_failed must be in 0..1"),
    ({"url": "http://h", "directory": "d"}, "needs one of the options"),
    ({}, "needs one of the options url, directory"),
  ],
)
def test_mistakes_are_user_errors(options, message):
  with pytest.raises(UserError, match=message):
    rewards.make({"hpsv3": 1.0}, options={"hpsv3": options})


def answering(metrics):
  """A client whose service answers every image with `metrics`, and the chosen metric."""

  class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
      self.reply({"rewards": ["hpsv3"]})

    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      self.reply({"results": [{"hpsv3": metrics} for _ in body["requests"]]})

    def reply(self, value):
      self.send_response(200)
      self.end_headers()
      self.wfile.write(json.dumps(value).encode())

    def log_message(self, *args):
      pass

  server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  server.url = f"http://127.0.0.1:{server.server_port}"
  return running(server)


@pytest.mark.parametrize(
  ("metrics", "metric", "expected"),
  [
    ({"hpsv3": 1.5, "sigma": 2.0}, None, 1.5),
    ({"mu": 1.5}, None, 1.5),
    ({"mu": 1.5, "sigma": 2.0}, "sigma", 2.0),
    ({"hpsv3": None}, None, np.nan),
    ({"hpsv3": float("nan")}, None, np.nan),
    ({"hpsv3": float("inf")}, None, np.nan),
    ({"hpsv3": 10**400}, None, np.nan),
    ({"hpsv3": "1.5"}, None, np.nan),
    ({"hpsv3": True}, None, np.nan),
    ([1.5], None, np.nan),
  ],
)
def test_metrics_of_a_foreign_service(metrics, metric, expected):
  with answering(metrics) as server:
    reward = RemoteReward("hpsv3", url=server.url, metric=metric, attempts=1)
    np.testing.assert_array_equal(score(reward, 2), [expected, expected])


def test_an_ambiguous_metric_is_a_user_error():
  with answering({"mu": 1.5, "sigma": 2.0}) as server:
    reward = RemoteReward("hpsv3", url=server.url)
    with pytest.raises(UserError, match="no metric 'hpsv3'.*mu, sigma"):
      score(reward, 2)
