"""Sets of held-out prompts, each with the rewards that are scored on it."""

import os.path
from collections.abc import Iterator
from typing import Any, NamedTuple

from rtdmd_jax.datasets.prompts import Prompt, load_prompts
from rtdmd_jax.errors import UserError
from rtdmd_jax.rewards.needs import shortage


class HeldOut(NamedTuple):
  """A set of held-out prompts, and the rewards that are scored on it.

  Attributes:
    path: where the prompts are from.
    prompts: all of them, or those of an evaluation.
    rewards: names; of `data.held_out`, which previews show, there may be none.
  """

  path: str
  prompts: list[Prompt]
  rewards: tuple[str, ...]


def reward_sections(config: Any) -> Iterator[tuple[str, str, Any]]:
  """`(section, name, options)` of every reward that a run evaluates, those of `rewards` first."""
  for section, rewards in (("rewards", config.rewards), ("eval.rewards", config.eval.rewards)):
    for name, options in rewards.items():
      yield section, name, options


def held_out_path(config: Any, section: str, name: str, options: Any) -> str:
  """The held-out prompts of a reward: its own `held_out`, or `data.held_out`.

  Raises:
    UserError: `held_out` is not a text.
  """
  own = options.get("held_out", "")
  if not isinstance(own, str):
    raise UserError(f"{section}.{name}.held_out is {own!r}; name a prompt file or folder.")
  return own or config.data.held_out


def held_out_sets(config: Any) -> list[HeldOut]:
  """The set of `data.held_out`, and after it the others that rewards name, each read once.

  Raises:
    UserError: a missing or broken file; the key that names it is named.
  """
  keys: dict[str, tuple[str, str]] = {}
  names: dict[str, list[str]] = {}

  def take(path: str, key: str) -> list[str]:
    same = os.path.normpath(path)
    keys.setdefault(same, (path, key))
    return names.setdefault(same, [])

  take(config.data.held_out, "data.held_out")
  for section, name, options in reward_sections(config):
    path = held_out_path(config, section, name, options)
    take(path, f"{section}.{name}.held_out").append(name)
  return [HeldOut(path, _read(path, key), tuple(names[k])) for k, (path, key) in keys.items()]


def shortages(config: Any, sets: list[HeldOut]) -> list[str]:
  """A sentence for each reward whose held-out prompts lack what it needs."""
  of = {name: part for part in sets for name in part.rewards}
  sentences = (
    shortage(section, name, of[name].prompts, of[name].path, options)
    for section, name, options in reward_sections(config)
  )
  return [sentence for sentence in sentences if sentence is not None]


def _read(path: str, key: str) -> list[Prompt]:
  try:
    return load_prompts(path, split="test", metadata=True)
  except UserError as error:
    raise UserError(f"{key}: {error}") from error
