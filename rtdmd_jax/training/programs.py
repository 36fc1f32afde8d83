"""A step's compiled programs as records: what each is called, reads and updates."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from rtdmd_jax.runtime.checked_jit import checked_jit
from rtdmd_jax.runtime.sharding import constrain_by_rules
from rtdmd_jax.training.state import TrainState

# What a program may read, by the name that its caller knows it under.
KNOWN = ("state", "frozen", "batch", "samples", "rewards")


class Program(NamedTuple):
  """A part of a training step that is compiled as one program.

  Attributes:
    name: its name in logs, reports and profiles.
    run: maps what it reads, and with a stream a key, to its results.
    reads: its arguments, names in `KNOWN`; the first is the state.
    stream: a number that sets its random keys apart from other programs'; None if it has none.
    updates: whether it returns the state, or a tuple with the state first, and takes the memory of
      the state over.
  """

  name: str
  run: Callable[..., Any]
  reads: tuple[str, ...]
  stream: int | None
  updates: bool = True

  def arguments(self, known: Mapping[str, Any]) -> list[Any]:
    """The program's arguments, taken from all that is known."""
    return [known[name] for name in self.reads]

  def compile(self, seed: int, *, check_numbers: bool = False) -> Callable[..., Any]:
    """The compiled program, a function of what it reads.

    The key of a step is derived inside the program from the seed, the stream and the number of the
    step, which is in the state.

    Args:
      seed: the run's.
      check_numbers: see `checked_jit`.
    """

    def keyed(state: TrainState, *args: Any) -> Any:
      if self.stream is None:
        out = self.run(state, *args)
      else:
        key = jax.random.fold_in(jax.random.key(seed), self.stream)
        out = self.run(state, *args, jax.random.fold_in(key, state.step))
      return _in_place(out) if self.updates else out

    keyed.__name__ = self.name
    donated = {"donate_argnums": 0} if self.updates else {}
    return checked_jit(keyed, check=check_numbers and self.stream is not None, **donated)


def _in_place(out: Any) -> Any:
  """Keeps the state where it is, so that the next step finds it where it was compiled for."""
  if isinstance(out, TrainState):
    return constrain_by_rules(out)
  return (constrain_by_rules(out[0]), *out[1:])


def compile_programs(
  programs: tuple[Program, ...], seed: int, *, check_numbers: bool = False
) -> dict[str, Callable[..., Any]]:
  """Every program compiled, by name."""
  return {p.name: p.compile(seed, check_numbers=check_numbers) for p in programs}
