"""Serves rewards over HTTP: `python -m rtdmd_jax.rewards.serve --rewards=ocr`.

With `--config` the rewards and their options are those of the configuration's section `rewards`,
which a training configuration has, and `--rewards` chooses among them. Options are given or changed
by `--option=NAME.KEY=VALUE`. The server listens on this machine only, unless `--host` says
otherwise, which needs `--token_env`. SIGTERM ends it after the requests in progress. It reads the
rewards' model files and writes nothing.
"""

import ast
import ipaddress
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence

from absl import flags

from rtdmd_jax import cli
from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.multi import RUN_KEYS

_SHORTEST_TOKEN = 16


def define_flags(values: flags.FlagValues) -> None:
  """Adds this tool's flags."""
  flags.DEFINE_list("rewards", None, "Rewards to serve, by name or import path.", values)
  flags.DEFINE_multi_string("option", [], "NAME.KEY=VALUE: an option of a reward.", values)
  flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.", values)
  flags.DEFINE_integer("port", 8080, "Port; 0 takes a free one.", 0, flag_values=values)
  flags.DEFINE_string("token_env", None, "Environment variable with the bearer token.", values)
  flags.DEFINE_integer("max_images", 256, "Images in one request.", 1, flag_values=values)
  flags.DEFINE_integer("max_body_mb", 256, "Megabytes in one request.", 1, flag_values=values)


def main(call: cli.Invocation) -> None:
  """Builds the rewards and serves them until SIGTERM."""
  given = call.flags
  token = _token(given.host, given.token_env)
  options = _options(call)
  # Only now, so that mistakes on the command line are answered fast.
  from rtdmd_jax.rewards.multi import make
  from rtdmd_jax.rewards.serve.server import RewardServer
  from rtdmd_jax.rewards.serve.service import Limits, Service

  logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
  limits = Limits(body=given.max_body_mb * 2**20, images=given.max_images)
  service = Service(make(dict.fromkeys(options, 1.0), options=options).rewards, limits)
  try:
    server = RewardServer((given.host, given.port), service, token=token)
  except (OSError, OverflowError) as error:
    raise UserError(f"cannot listen on {given.host} port {given.port}: {error}") from error
  stop = threading.Event()
  signal.signal(signal.SIGTERM, lambda *_: stop.set())
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  try:
    print(f"serving {', '.join(options)} on {server.url}", flush=True)
    stop.wait()
  finally:
    server.shutdown()
    thread.join()
    server.server_close()
  print("stopped", flush=True)


def _token(host: str, variable: str | None) -> str | None:
  """The bearer token; None only for a server that other machines cannot reach."""
  if variable is None:
    if not _is_loopback(host):
      raise UserError(
        f"--host={host} can be reached from other machines: name the environment variable of a"
        " bearer token with --token_env"
      )
    return None
  token = os.environ.get(variable, "").strip()
  if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
    raise UserError(
      f"--token_env: the environment variable {variable} must hold at least {_SHORTEST_TOKEN}"
      " printable characters"
    )
  return token


def _is_loopback(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


def _options(call: cli.Invocation) -> dict[str, dict]:
  """Options of each reward to serve, by name."""
  configured = {}
  if call.config is not None:
    if not call.config.get("rewards"):
      raise UserError("--config: the configuration has no section 'rewards'")
    configured = call.config.rewards.to_dict()
  names: Sequence[str] = call.flags.rewards or list(configured)
  if not names:
    raise UserError("name the rewards with --rewards=NAME,... or a configuration with --config")
  options = {name: dict(configured.get(name, {})) for name in names}
  for text in call.flags.option:
    # An import path has dots of its own, so the key is what follows the last one.
    target, equals, value = text.partition("=")
    name, _, key = target.rpartition(".")
    if not equals or name not in options:
      raise UserError(
        f"--option={text}: write NAME.KEY=VALUE with NAME one of {', '.join(options)}"
      )
    options[name][key] = _literal(value)
  for name in options:
    # What concerns a run alone: its training, or the prompts of its evaluations.
    for key in (*RUN_KEYS, "max_failed", "prompts"):
      options[name].pop(key, None)
  return options


def _literal(text: str) -> object:
  """A Python number, string, tuple or the like; the text itself if it is none."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


if __name__ == "__main__":
  sys.exit(cli.run(main, define_flags=define_flags, shared=("config",)))
