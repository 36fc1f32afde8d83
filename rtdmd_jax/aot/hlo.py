"""Traffic of a compiled program, from the text of its HLO: memory and collectives, loops included.

The text is that of one device's program (SPMD), so all numbers are per device.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field

from rtdmd_jax.aot.hlo_text import SHAPE, Computation, Instruction, parse, shape_bytes

_CALLED = re.compile(
  r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_LIBRARIES = {
  "__cublas": "cuBLAS", "__cudnn$fmha": "cuDNN attention", "__cudnn$conv": "cuDNN convolution",
}  # fmt: skip
_COLLECTIVES = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip
# Instructions that move nothing themselves.
_FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
  "after-all", "partition-id", "replica-id", "opt-barrier", "domain", "add-dependency", "iota",
}  # fmt: skip


@dataclass
class Traffic:
  """The traffic of one device in one run of the program.

  Attributes:
    memory: bytes read from and written to its memory.
    sent: bytes it sends, by kind of collective.
    count: how many collectives of each kind run.
    unknown_loops: loops whose number of turns the text does not tell.
    kernels: how many kernels run on a GPU, by kind: "cuBLAS", "cuDNN attention", "cuDNN attention
      backward", "cuDNN convolution", "Triton", "fusion" and "other". Collectives are not in it.
    cycles: that libtpu expects its fused operations to take; it has none of Pallas kernels.
  """

  memory: float
  sent: dict[str, float]
  count: dict[str, int]
  unknown_loops: int
  kernels: dict[str, int] = field(default_factory=lambda: defaultdict(int))
  cycles: int = 0


def traffic(text: str, unknown_turns: int = 1) -> Traffic:
  """Counts a compiled program's traffic.

  Memory counts the operands and results of every fused operation as XLA's own "bytes accessed"
  does (of a stack that a fusion slices, the slice), times the turns of the loops around it. Sent
  bytes are those of ring algorithms: (n - 1) / n of the whole array for a gather, a scatter or an
  exchange among n devices, twice that for an all-reduce.

  Args:
    text: `compiled.as_text()`.
    unknown_turns: turns of loops whose number the text does not tell.
  """
  computations, entry = parse(text)
  out = Traffic(0.0, defaultdict(float), defaultdict(int), 0)
  _walk(computations, computations[entry], 1, unknown_turns, out, set())
  return out


def _walk(all_, computation, times, unknown_turns, out, channels) -> None:
  """Adds what `computation` moves when it runs `times` times."""
  for ins in computation.instructions.values():
    called = dict(_CALLED.findall(ins.text))
    if ins.opcode == "while":
      known = _TRIP_COUNT.search(ins.text)
      turns = int(known[1]) if known else loop_turns(all_[called["condition"]])
      out.unknown_loops += turns is None
      turns = unknown_turns if turns is None else turns
      _walk(all_, all_[called["body"]], times * turns, unknown_turns, out, channels)
    elif ins.opcode == "conditional":
      names = _BRANCHES.search(ins.text)
      names = re.findall(r"[\w.\-]+", names[1]) if names else [
        called["true_computation"], called["false_computation"]
      ]  # fmt: skip
      _most_expensive(all_, names, times, unknown_turns, out, channels)
    elif ins.opcode == "call":
      _walk(all_, all_[called["to_apply"]], times, unknown_turns, out, channels)
    elif ins.opcode == "async-start":
      _walk(all_, all_[called["calls"]], times, unknown_turns, out, channels)
    else:
      inner = all_.get(called.get("calls"))
      if kind := _kernel(ins, inner):
        out.kernels[kind] += times
      _collectives(all_, ins, inner, times, out, channels)
      out.memory += times * _memory(all_, computation, ins, inner)
      out.cycles += times * sum(map(int, _CYCLES.findall(ins.text)))


def _most_expensive(all_, names, times, unknown_turns, out, channels) -> None:
  options = []
  for name in names:
    option = Traffic(0.0, defaultdict(float), defaultdict(int), 0)
    _walk(all_, all_[name], times, unknown_turns, option, channels)
    options.append(option)
  most = max(options, key=lambda o: o.memory + sum(o.sent.values()))
  out.memory += most.memory
  out.cycles += most.cycles
  out.unknown_loops += most.unknown_loops
  for kind in most.kernels:
    out.kernels[kind] += most.kernels[kind]
  for kind in most.count:
    out.sent[kind] += most.sent[kind]
    out.count[kind] += most.count[kind]


def loop_turns(condition: Computation) -> int | None:
  """Turns of a loop whose counter runs from 0 up to a constant; None for another loop."""
  constants = {
    i.name: int(match[1])
    for i in condition.instructions.values()
    if (match := re.search(r"[su]\d+\[\]\S* constant\((-?\d+)\)", i.text))
  }
  root = condition.root
  if root.opcode == "fusion" or root.opcode != "compare" or "direction=LT" not in root.text:
    return None
  return constants.get(root.operands[1])


def _kernel(ins: Instruction, inner: Computation | None) -> str | None:
  """The kind of kernel that an instruction launches on a GPU; None for none or a collective."""
  if ins.opcode in _FREE or ins.opcode.endswith(("-done", "-update")):
    return None
  if ins.opcode.removesuffix("-start") in _COLLECTIVES:
    return None
  if '"kind":"__triton' in ins.text:
    return "Triton"
  # A library's call may lie in a fusion that only hands it slices of its operands.
  parts = [ins, *(inner.instructions.values() if inner is not None else ())]
  for target in (t for part in parts for t in _TARGET.findall(part.text)):
    for prefix, kind in _LIBRARIES.items():
      if target.startswith(prefix):
        return f"{kind} backward" if target.endswith("Backward") else kind
  return "fusion" if ins.opcode in ("fusion", "fusion-start") else "other"


def _collectives(all_, ins, inner, times, out, channels) -> None:
  """Adds an instruction's collective, or those fused into it; their parts share a channel."""
  operations = [(computation, i) for computation, i in _nested(all_, ins, inner)]
  for where, part in operations:
    kind = part.opcode.removesuffix("-start")
    if kind not in _COLLECTIVES:
      continue
    channel = re.search(r"channel_id=(\d+)", part.text)
    if channel:
      if channel[1] in channels:
        continue
      channels.add(channel[1])
    # TPU's form of a reduce-scatter: an all-reduce whose result is cut inside one fusion.
    if kind == "all-reduce" and where.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"
      whole = shape_bytes(part.result)
    else:
      whole = _whole(kind, part)
    out.sent[kind] += times * whole * _share(kind, group_size(part.text))
    out.count[kind] += times


def _nested(all_, ins, inner):
  """The instruction and, if it is a fusion, everything inside, with the name of its place."""
  yield "", ins
  if inner is not None:
    for i in inner.instructions.values():
      deeper = all_.get(dict(_CALLED.findall(i.text)).get("calls"))
      yield from ((place or inner.name, part) for place, part in _nested(all_, i, deeper))


def _whole(kind: str, ins: Instruction) -> float:
  """Bytes of the array that a collective works on, before it is cut or after it is joined."""
  total = shape_bytes(ins.result)
  if ins.opcode.endswith("-start") and kind != "all-reduce":
    # (operand, result, ...): the larger one is the whole array.
    total = max(shape_bytes(f"{k}[{n}]") for k, n, _ in SHAPE.findall(ins.result))
  elif kind == "reduce-scatter":
    total *= group_size(ins.text)
  return total


def _share(kind: str, group: int) -> float:
  """Part of the whole array that one device sends."""
  if kind == "collective-permute":
    return 1.0
  return (2.0 if kind == "all-reduce" else 1.0) * (group - 1) / group


def group_size(text: str) -> int:
  """Devices that take part together.

  Raises:
    ValueError: a form of `replica_groups` that is not known.
  """
  if "source_target_pairs=" in text:
    return 2
  match = re.search(r"replica_groups=(\S.*)", text)
  groups = match[1] if match else ""
  if match := re.match(r"mesh\[([^\]]*)\]\s*\{([^}]*)\}", groups):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
    parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
    return math.prod(int(part) if part else sizes[name] for name, part in parts)
  if match := re.match(r"\[(\d+),(\d+)\]", groups):
    return int(match[2])
  if match := re.match(r"\{\{([\d,]*)\}", groups):
    return len(match[1].split(","))
  raise ValueError(f"cannot read the devices of the collective {text[:200]!r}")


def _memory(all_, computation: Computation, ins: Instruction, inner: Computation | None) -> float:
  """Bytes of device memory that one instruction reads and writes."""
  if ins.opcode in _FREE or ins.opcode.endswith(("-done", "-update")):
    return 0.0
  shapes = [computation.instructions[name].result for name in ins.operands]
  if ins.opcode == "copy-start":
    first = SHAPE.search(ins.result)[0]
    return sum(shape_bytes(s, on_chip=False) for s in (first, *shapes))
  if ins.opcode in ("slice-start", "dynamic-slice-start"):
    return sorted(shape_bytes(f"{k}[{n}]") for k, n, _ in SHAPE.findall(ins.result))[-2]
  if ins.opcode in ("dynamic-slice", "slice", "gather"):
    return shape_bytes(ins.result) * (_off_chip(shapes[0]) + _off_chip(ins.result))
  if ins.opcode == "dynamic-update-slice":
    return 2.0 * shape_bytes(shapes[1]) if _off_chip(ins.result) else 0.0
  if 'custom_call_target="AllocateBuffer"' in ins.text:
    return 0.0
  if _is_library_call(ins):
    return sum(shape_bytes(s, on_chip=False) for s in (*shapes, *_results(ins)))
  if inner is not None and ins.opcode == "fusion":
    return sum(_fusion_reads(all_, inner, shapes)) + _fusion_writes(all_, inner, ins)
  return sum(shape_bytes(s, on_chip=False) for s in (*shapes, ins.result))


def _is_library_call(ins: Instruction) -> bool:
  return 'custom_call_target="__cu' in ins.text


def _results(ins: Instruction) -> list[str]:
  """Shapes of a library call's results, without the workspace, which is the last of several."""
  shapes = [match[0] for match in SHAPE.finditer(ins.result)]
  return shapes[:-1] if len(shapes) > 1 else shapes


def _off_chip(shape: str) -> bool:
  return shape_bytes(shape, on_chip=False) > 0


def _fusion_reads(all_, inner: Computation, shapes: list[str]):
  """Bytes of each operand that a fusion reads: only the slice where it does nothing but slice."""
  names = _parameters(inner)
  for number, shape in enumerate(shapes):
    whole = shape_bytes(shape, on_chip=False)
    yield min(whole, _bytes_read(all_, inner, names[number], whole)) if whole else 0.0


def _parameters(computation: Computation) -> dict[int, str]:
  """Names of a computation's parameters by their number."""
  return {
    int(re.search(r"parameter\((\d+)\)", i.text)[1]): i.name
    for i in computation.instructions.values()
    if i.opcode == "parameter"
  }


def _bytes_read(all_, inner: Computation, name: str, whole: float) -> float:
  """Bytes that a fusion, and those inside it, read of the array `name` of `whole` bytes."""
  total = 0.0
  for user in inner.instructions.values():
    for number in (n for n, operand in enumerate(user.operands) if operand == name):
      if user.opcode in ("dynamic-slice", "slice") and number == 0:
        total += shape_bytes(user.result)
      elif user.opcode == "dynamic-update-slice" and number == 0:
        pass  # written in place
      elif user.opcode == "bitcast":
        total += _bytes_read(all_, inner, user.name, whole)
      elif user.opcode == "fusion":
        nested = all_[dict(_CALLED.findall(user.text))["calls"]]
        total += _bytes_read(all_, nested, _parameters(nested)[number], whole)
      else:
        return whole
  # Of what nothing uses we cannot tell; it is passed on whole.
  return total if any(name in i.operands for i in inner.instructions.values()) else whole


def _fusion_writes(all_, inner: Computation, ins: Instruction) -> float:
  """Bytes of a fusion's results: only the update where it updates a stack in place."""
  root = inner.root
  if _is_library_call(root):
    return sum(shape_bytes(shape, on_chip=False) for shape in _results(root))
  names = root.operands if root.opcode == "tuple" else [root.name]
  layouts = [m[0] for m in SHAPE.finditer(ins.result)]
  if len(names) != len(layouts):  # a result inside is a tuple itself
    return shape_bytes(ins.result, on_chip=False)
  total = 0.0
  for name, layout in zip(names, layouts, strict=True):
    where, part = _producer(all_, inner, name)
    if part.opcode == "dynamic-update-slice" and _off_chip(layout):
      layout = SHAPE.search(where.instructions[part.operands[1]].result)[0]
      total += shape_bytes(layout)
    else:
      total += shape_bytes(layout, on_chip=False)
  return total


def _producer(all_, inner: Computation, name: str) -> tuple[Computation, Instruction]:
  """The maker of array `name` in a fusion, behind bitcasts and fusions of one result."""
  part = inner.instructions[name]
  if part.opcode == "bitcast":
    return _producer(all_, inner, part.operands[0])
  if part.opcode == "fusion":
    nested = all_[dict(_CALLED.findall(part.text))["calls"]]
    if nested.root.opcode != "tuple":
      return _producer(all_, nested, nested.root.name)
  return inner, part
