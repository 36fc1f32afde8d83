"""The result of a check, and how it is printed."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rtdmd_jax.errors import EXIT_USER_ERROR, UserError


@dataclass
class Report:
  """Lines of text about what would run; sentences about what is wrong, and what may be.

  A problem ends the run or makes its result another one than was asked for; a warning does not.
  """

  lines: list[str] = field(default_factory=list)
  problems: list[str] = field(default_factory=list)
  warnings: list[str] = field(default_factory=list)

  def problem(self, sentence: str) -> None:
    """Adds a problem, once."""
    _add(self.problems, sentence)

  def warning(self, sentence: str) -> None:
    """Adds a warning, once."""
    _add(self.warnings, sentence)

  def attempt(self, part: Callable, *args: Any) -> Any:
    """The result of `part(*args)`; None if it raises a `UserError`, which is a problem then."""
    try:
      return part(*args)
    except UserError as error:
      self.problem(str(error))
      return None


def _add(sentences: list[str], sentence: str) -> None:
  sentence = " ".join(sentence.split())
  if sentence not in sentences:
    sentences.append(sentence)


def show(report: Report) -> int:
  """Prints a report, its last line being the number of problems; the exit code of the process.

  Warnings and problems go to stderr, in order with the rest where both are one terminal.
  """
  for line in report.lines:
    print(line)
  sys.stdout.flush()
  for kind, sentences in (("warning", report.warnings), ("error", report.problems)):
    for sentence in sentences:
      print(f"{kind}: {sentence}", file=sys.stderr)
  sys.stderr.flush()
  count = len(report.problems)
  print(f"{count} problem{'s' * (count > 1)}" if count else "no problem found", flush=True)
  return EXIT_USER_ERROR if count else 0
