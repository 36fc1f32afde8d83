"""The reward service over HTTP, on the standard library."""

import hmac
import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from rtdmd_jax.rewards.remote.protocol import BadMessage
from rtdmd_jax.rewards.serve.service import Service, TooMany

_logger = logging.getLogger(__name__)
_BLOCK = 1 << 20


class _Refused(Exception):
  """A request that is answered with a status and a sentence."""

  def __init__(self, status: int, reason: str):
    super().__init__(reason)
    self.status = status


class RewardServer(ThreadingHTTPServer):
  """Serves `service`: `POST /score`, `GET /rewards`, `/health` and `/metrics`.

  With a token, all but `/health` need it as bearer token. `server_close` waits for the requests in
  progress.
  """

  daemon_threads = False
  request_queue_size = 128

  def __init__(self, address: tuple[str, int], service: Service, *, token: str | None = None):
    super().__init__(address, _Handler)
    self.service = service
    self.token = token
    self.slots = threading.BoundedSemaphore(service.limits.requests)

  @property
  def url(self) -> str:
    """The address that the server listens at."""
    host, port = self.server_address[:2]
    return f"http://{host}:{port}"

  def handle_error(self, request: object, client_address: object) -> None:
    """Logs what a handler did not expect; the client went away, as a rule."""
    _logger.warning("connection from %s failed", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
  """One request a connection (HTTP/1.0), so that no idle client delays the end of the server."""

  server: RewardServer
  server_version = "rtdmd_jax"
  sys_version = ""

  def setup(self) -> None:
    self.timeout = self.server.service.limits.idle
    super().setup()

  def do_GET(self) -> None:
    """Pages: /health, /rewards, /metrics."""
    service = self.server.service
    if self.path == "/health":
      states = {name: ["ready"] for name in service.names}
      self._answer(200, {"status": "ok", "rewards": states})
    elif not self._authorized():
      self._answer(401, {"error": "a bearer token is needed"})
    elif self.path == "/rewards":
      self._answer(200, {"rewards": service.names})
    elif self.path == "/metrics":
      self._send(200, service.metrics_page().encode(), "text/plain; version=0.0.4; charset=utf-8")
    else:
      self._answer(404, {"error": "no such page"})

  def do_POST(self) -> None:
    """`/score`."""
    try:
      if self.path != "/score":
        raise _Refused(404, "no such page")
      if not self._authorized():
        raise _Refused(401, "a bearer token is needed")
      if not self.server.slots.acquire(blocking=False):
        raise _Refused(503, "too many requests at once")
      try:
        answer = self.server.service.score(self._read_json())
      finally:
        self.server.slots.release()
      self._answer(200, answer)
    except _Refused as refused:
      self._answer(refused.status, {"error": str(refused)})
    except TooMany as error:
      self._answer(413, {"error": str(error)})
    except BadMessage as error:
      self._answer(422, {"error": str(error)})

  def _authorized(self) -> bool:
    if self.server.token is None:
      return True
    given = self.headers.get("Authorization", "").encode("utf-8", "replace")
    return hmac.compare_digest(given, f"Bearer {self.server.token}".encode())

  def _read_json(self) -> object:
    limits = self.server.service.limits
    length = self.headers.get("Content-Length", "")
    if not (length.isascii() and length.isdigit()):
      raise _Refused(411, "a Content-Length is needed")
    if int(length) > limits.body:
      raise _Refused(413, f"the body has {length} bytes, but at most {limits.body} are accepted")
    # The socket's timeout guards one read; this guards a body that trickles.
    deadline = time.monotonic() + limits.idle
    parts, missing = [], int(length)
    while missing:
      part = self.rfile.read1(min(missing, _BLOCK))
      if not part or time.monotonic() > deadline:
        raise _Refused(408, "the body did not arrive in time")
      parts.append(part)
      missing -= len(part)
    try:
      return json.loads(b"".join(parts))
    except (ValueError, RecursionError) as error:
      raise _Refused(400, "the body is not JSON") from error

  def _answer(self, status: int, value: dict) -> None:
    body = json.dumps(value, allow_nan=False).encode()
    self._send(status, body, "application/json")

  def _send(self, status: int, body: bytes, kind: str) -> None:
    self.server.service.count("requests_total", "status", str(status))
    self.send_response(status)
    self.send_header("Content-Type", kind)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, format: str, *args: object) -> None:
    """Requests are counted on the metrics page, and logged only for debugging."""
    _logger.debug("%s " + format, self.address_string(), *args)
