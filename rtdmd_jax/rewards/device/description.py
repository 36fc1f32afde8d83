"""A reward on the device as its config files describe it, ahead of weights and tokenizer."""

import abc
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from rtdmd_jax.weights.source import read_file

# Maps a model's directory and a JSON file inside to its contents.
ReadFrom = Callable[[str | os.PathLike, str], dict[str, Any]]


class RewardDescription(NamedTuple):
  """A reward of which no weights have been read.

  Attributes:
    model: the reward, whose `params` are shapes and which tokenizes nothing.
    load: reads weights and tokenizer; it returns the reward as it scores.
  """

  model: Any
  load: Callable[[], Any]


class Loadable(abc.ABC):
  """A class of rewards that `describe` makes of a reader and the reward's options.

  Attributes:
    PUBLISHED: the options that name config files, as they are published.
  """

  PUBLISHED: ClassVar[Mapping[str, str]]

  @classmethod
  @abc.abstractmethod
  def describe(cls, read: ReadFrom, *args: Any, **options: Any) -> RewardDescription:
    """Reads config files with `read`; the options are the reward's own."""

  @classmethod
  def from_pretrained(cls, *args: Any, **options: Any) -> Any:
    """Loads the reward; the arguments are those of `describe` after `read`.

    Raises:
      UserError: missing or broken files, or files that do not fit together.
    """
    return cls.describe(read_file, *args, **options).load()
