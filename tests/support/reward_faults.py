"""A reward service on a real socket, and a proxy before it that misbehaves on demand."""

import http.client
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from rtdmd_jax.rewards.serve.server import RewardServer
from rtdmd_jax.rewards.serve.service import LIMITS, Service


def numbered(count, size=8):
  """Images [count, size, size, 3] that each carry their number, to see scores that got mixed up."""
  images = np.zeros((count, size, size, 3), np.uint8)
  images[..., 1] = (np.arange(count) // 256)[:, None, None]
  images[..., 0] = (np.arange(count) % 256)[:, None, None]
  return images


def number(images, prompts, metadata):
  """The number that an image carries, plus one half."""
  del prompts, metadata
  return images[:, 0, 0, 0] + 256.0 * images[:, 0, 0, 1] + 0.5


@contextmanager
def running(server):
  thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


def serving(rewards, *, port=0, token=None, limits=LIMITS):
  """A running RewardServer as context manager."""
  return running(RewardServer(("127.0.0.1", port), Service(rewards, limits), token=token))


class Proxy(ThreadingHTTPServer):
  """Forwards to `port`; `fault(n)` names what happens to the n-th POST, None or "" for nothing."""

  daemon_threads = True
  request_queue_size = 128

  def __init__(self, port, fault):
    super().__init__(("127.0.0.1", 0), _Faulty)
    self.port, self.fault = port, fault
    self.faults = []
    self.lock = threading.Lock()
    self.url = f"http://127.0.0.1:{self.server_address[1]}"

  def handle_error(self, request, client_address):
    pass  # clients give up on slow answers

  def next_fault(self):
    with self.lock:
      self.faults.append(self.fault(len(self.faults)))
      return self.faults[-1]


BODIES = {
  "html": b"<html>504 Gateway Time-out</html>",
  "empty": b"",
  "list": b"[1, 2, 3]",
  "short": b'{"results": [], "errors": []}',
  "text": b'{"results": "0.7", "errors": {}}',
  "bytes": bytes(range(256)),
}


class _Faulty(BaseHTTPRequestHandler):
  def do_GET(self):
    self._reply(*self._forward(None))

  def do_POST(self):
    body = self.rfile.read(int(self.headers["Content-Length"]))
    fault = self.server.next_fault()
    if fault == "drop":
      return
    if fault == "slow":
      time.sleep(1.0)
    if fault == "500":
      self._reply(500, b"{}")
    elif fault in BODIES:
      self._reply(200, BODIES[fault])
    elif fault == "trickle":
      self._reply(200, b" " * 100, pause=0.05)
    elif fault == "cut":
      status, answer = self._forward(body)
      self._reply(status, answer[: len(answer) // 2], length=len(answer))
    else:
      self._reply(*self._forward(body))

  def _forward(self, body):
    connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=10)
    connection.request(self.command, self.path, body=body, headers=dict(self.headers))
    response = connection.getresponse()
    return response.status, response.read()

  def _reply(self, status, body, length=None, pause=0.0):
    self.send_response(status)
    self.send_header("Content-Length", str(len(body) if length is None else length))
    self.end_headers()
    for part in [body[i : i + 1] for i in range(len(body))] if pause else [body]:
      self.wfile.write(part)
      time.sleep(pause)

  def log_message(self, *args):
    pass
