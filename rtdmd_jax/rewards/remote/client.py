"""JSON over HTTP with a deadline, bounded retries and back-off, on the standard library."""

import http.client
import json
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

from rtdmd_jax.errors import UserError

# Answers that no repetition changes: the request, the token or its size is wrong.
_PERMANENT = {400, 401, 403, 405, 411, 413, 415, 422}
_MAX_ANSWER = 64 * 2**20
_HINTS = {
  401: "; name the variable that holds the service's token in token_env",
  403: "; name the variable that holds the service's token in token_env",
  413: "; send fewer images at once with a smaller chunk",
}
T = TypeVar("T")


class TransientError(Exception):
  """A try that failed in a way that another try may not: network, overload, a garbled answer."""


class Retry(NamedTuple):
  """Limits on repeated attempts.

  Attributes:
    timeout: seconds for one try, from connecting to the last byte of the answer.
    attempts: tries in all.
    backoff: seconds before the second try; doubled before each further one.
    backoff_limit: most seconds between two tries. Each pause is drawn from the upper half of its
      length, so that many clients do not return at once.
  """

  timeout: float = 120.0
  attempts: int = 6
  backoff: float = 0.5
  backoff_limit: float = 30.0


DEFAULT = Retry()


class JsonClient:
  """Talks JSON to one service; safe to use from several threads.

  Every request has its own connection, so that a service that was restarted is found again.
  Redirects are not followed and proxies not used.
  """

  def __init__(self, url: str, retry: Retry = DEFAULT, *, token_env: str | None = None):
    """Checks the address and reads the token; nothing is sent yet.

    Args:
      url: `http://host:port/prefix` or https.
      retry: deadlines and repetitions.
      token_env: name of the environment variable with the bearer token, None for no token.

    Raises:
      UserError: not such an address, the variable is not set, or numbers that make no sense.
    """
    parts = urlsplit(url)
    if parts.username or parts.password:
      raise UserError("the url of a service must hold no password; use token_env for secrets")
    try:
      self._port = parts.port
    except ValueError as error:
      raise UserError(f"url {url!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
      raise UserError(f"url {url!r} is not of the form http://host:port")
    if not (retry.timeout > 0 and retry.attempts >= 1 and retry.backoff >= 0):
      raise UserError(f"{url}: timeout and attempts must be positive and backoff not negative")
    self.url = url.rstrip("/")
    self.retry = retry
    self._host, self._path = parts.hostname, parts.path.rstrip("/")
    self._context = ssl.create_default_context() if parts.scheme == "https" else None
    self._headers = {"Accept": "application/json", "Connection": "close"}
    if token_env is not None:
      self._headers["Authorization"] = f"Bearer {_secret(token_env)}"

  def tries(self) -> Iterator[int]:
    """Numbers of the tries, 0 first; pauses before every further one."""
    for number in range(self.retry.attempts):
      if number:
        pause = min(self.retry.backoff * 2 ** (number - 1), self.retry.backoff_limit)
        time.sleep(pause * random.uniform(0.5, 1.0))
      yield number

  def ask(self, path: str, value: object | None, read: Callable[[object], T]) -> T:
    """Sends `value` (a GET if None) until `read` accepts the answer.

    Raises:
      TransientError: the last try's failure.
      UserError: the service refuses the request for good.
    """
    for number in self.tries():
      try:
        return read(self.once(path, value))
      except TransientError:
        if number + 1 == self.retry.attempts:
          raise
    raise AssertionError("unreachable: there is at least one try")

  def once(self, path: str, value: object | None) -> object:
    """The decoded answer of a single try; raises as `ask` does."""
    status, body = self._exchange(path, None if value is None else json.dumps(value).encode())
    if status in _PERMANENT:
      text = " ".join(body[:300].decode("utf-8", "replace").split())
      raise UserError(f"{self.url}{path} answers {status}: {text}{_HINTS.get(status, '')}")
    if status != 200:
      raise TransientError(f"{self.url}{path} answers {status}")
    try:
      return json.loads(body)
    except (ValueError, RecursionError) as error:
      raise TransientError(f"{self.url}{path} answers what is not JSON") from error

  def _connection(self) -> http.client.HTTPConnection:
    timeout = self.retry.timeout
    if self._context is None:
      return http.client.HTTPConnection(self._host, self._port, timeout=timeout)
    return http.client.HTTPSConnection(
      self._host, self._port, timeout=timeout, context=self._context
    )

  def _exchange(self, path: str, body: bytes | None) -> tuple[int, bytes]:
    """Status and body; the deadline also holds against an answer that trickles."""
    deadline = time.monotonic() + self.retry.timeout
    connection, expired = self._connection(), threading.Event()
    timer = None
    try:
      connection.connect()
      sock = connection.sock

      def expire() -> None:
        expired.set()
        _shut(sock)

      timer = threading.Timer(max(deadline - time.monotonic(), 0.0), expire)
      timer.daemon = True
      timer.start()
      headers = self._headers | ({} if body is None else {"Content-Type": "application/json"})
      method = "GET" if body is None else "POST"
      connection.request(method, self._path + path, body=body, headers=headers)
      response = connection.getresponse()
      data = response.read(_MAX_ANSWER + 1)
      if len(data) > _MAX_ANSWER:
        raise TransientError(f"{self.url}{path} answers more than {_MAX_ANSWER} bytes")
      if response.length:  # http.client does not report a short body that is read by size
        raise http.client.IncompleteRead(data, response.length)
    except (OSError, http.client.HTTPException) as error:
      reason = "no answer in time" if expired.is_set() else f"{type(error).__name__}: {error}"
      raise TransientError(f"{self.url}{path}: {reason}") from error
    finally:
      if timer is not None:
        timer.cancel()
      connection.close()
    if expired.is_set():
      raise TransientError(f"{self.url}{path}: no answer in time")
    return response.status, data


def _shut(sock: socket.socket) -> None:
  """Wakes the thread that waits on `sock`, TLS or not."""
  try:
    socket.socket.shutdown(sock, socket.SHUT_RDWR)
  except OSError:
    pass  # already closed: the answer arrived at the last moment


def _secret(variable: str) -> str:
  value = os.environ.get(variable, "").strip()
  if not value or not value.isascii() or not value.isprintable():
    raise UserError(f"token_env: the environment variable {variable} must hold the service's token")
  return value
