"""The text of a compiled program, its HLO, as computations and instructions."""

import math
import re
from dataclasses import dataclass, field

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\((.*)$")
SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^{}]*\})?")
_BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclass
class Instruction:
  """One line: its name, operation, operands' names, result's shape and the whole text."""

  name: str
  opcode: str
  operands: list[str]
  result: str
  text: str
  root: bool


@dataclass
class Computation:
  """A named list of instructions."""

  name: str
  instructions: dict[str, Instruction] = field(default_factory=dict)

  @property
  def root(self) -> Instruction:
    """The instruction whose result it returns."""
    return next(i for i in self.instructions.values() if i.root)


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """The computations by name, and the name of the entry.

  Raises:
    ValueError: no entry, so this is no HLO module.
  """
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      current = computations[match[2]] = Computation(match[2])
      entry = match[2] if match[1] else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      result, opcode, rest = _split(match[3])
      operands = re.findall(r"%([\w.\-]+)", rest[: _closing(rest)])
      made = Instruction(match[2], opcode, operands, result, match[3], bool(match[1]))
      current.instructions[match[2]] = made
  if entry is None:
    raise ValueError("the text has no ENTRY computation")
  return computations, entry


def _split(text: str) -> tuple[str, str, str]:
  """Result's shape, opcode, and what follows the opcode's parenthesis."""
  end = _closing(text[1:]) + 2 if text.startswith("(") else 0
  match = _OPCODE.search(text, max(end - 1, 0))
  if match is None:
    raise ValueError(f"cannot read the instruction {text[:100]!r}")
  return text[: match.start()], match[1], match[2]


def _closing(text: str) -> int:
  """Index of the parenthesis that closes one opened before `text`."""
  depth = 1
  for i, char in enumerate(text):
    depth += (char == "(") - (char == ")")
    if depth == 0:
      return i
  return len(text)


def shape_bytes(shape: str, *, on_chip: bool = True) -> float:
  """Bytes of a shape or tuple of shapes; without `on_chip` those in on-chip memory are left out."""
  total = 0.0
  for kind, sizes, layout in SHAPE.findall(shape):
    # Spaces other than 0 are scratchpads: "S(1)" at the end of a layout.
    if on_chip or not re.search(r"S\([1-9]", layout):
      total += _bits(kind) / 8 * math.prod(int(n) for n in sizes.split(",") if n)
  return total


def _bits(kind: str) -> int:
  if kind in _BITS:
    return _BITS[kind]
  digits = re.search(r"\d+", kind)
  return int(digits[0]) if digits else 0
