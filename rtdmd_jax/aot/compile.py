"""Compiles every program of a run's step for a mesh of absent devices and measures the result."""

import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rtdmd_jax.aot.abstract import abstract_batch, abstract_setup, frozen_trees
from rtdmd_jax.aot.hlo import traffic
from rtdmd_jax.aot.topology import Topology, find_topology
from rtdmd_jax.errors import UserError
from rtdmd_jax.runtime import sharding
from rtdmd_jax.runtime.chips import roofline
from rtdmd_jax.runtime.flops import count_flops
from rtdmd_jax.runtime.throughput import loop_turns
from rtdmd_jax.training.programs import Program, compile_programs
from rtdmd_jax.training.setup import Setup
from rtdmd_jax.training.stages import STAGES, initial_state, step_programs
from rtdmd_jax.training.typed_config import micro_batches

Tree = Any


@dataclass
class Cost:
  """One program on one device; sizes in bytes, times in seconds.

  Attributes:
    name: of the program.
    fits: whether `peak` is within the memory that programs may have.
    reason: the compiler's sentence if it refused the program.
    arguments, outputs, temporaries, code: of the compiled program; outputs that reuse an argument's
      memory are left out.
    resident: arrays of the run that the program does not read but that stay where they are.
    peak: the sum of all these.
    flops: floating-point operations of matrix products and convolutions.
    memory: bytes to and from memory.
    sent: bytes sent, by kind of collective; `collectives` is how many run. None, as `times`, of a
      program that the compiler refused.
    kernels: launches by kind of kernel, of a GPU: see `hlo.Traffic`.
    unknown_loops: loops counted with the most turns that a rollout takes.
    times: see `chips.roofline`.
    compile_seconds: of lowering and compilation.
  """

  name: str
  fits: bool
  reason: str = ""
  arguments: float = 0
  outputs: float = 0
  temporaries: float = 0
  code: float = 0
  resident: float = 0
  peak: float = 0
  flops: float = 0
  memory: float = 0
  sent: dict[str, float] | None = None
  collectives: dict[str, int] | None = None
  kernels: dict[str, int] | None = None
  unknown_loops: int = 0
  times: dict[str, float] | None = None
  compile_seconds: float = 0


def measure(
  config: Any, topology: str, only: str = "", done: Callable[[Cost], None] = lambda cost: None
) -> dict[str, Any]:
  """Compiles the programs of `config` for `topology`; nothing is allocated or run.

  Args:
    config: of stage 1 or 2.
    topology: see `find_topology`.
    only: compile this program alone (and those whose results it reads).
    done: called after each program, which takes minutes.

  Returns:
    A report that JSON can hold: the mesh, the chip, what lives where, a `Cost` for each program.

  Raises:
    UserError: a bad config or topology, a batch that does not split over the devices, or a program
      on which the compiler itself fails.
  """
  if config.stage not in STAGES:
    raise UserError(f"stage is {config.stage!r}; use one of {', '.join(STAGES)}.")
  there = find_topology(topology)
  there.check(config)
  # Made before the mesh is set, so that no constant asks for a device that is not there.
  setup = abstract_setup(config)
  mesh = sharding.make_mesh(**config.mesh, devices=there.devices)
  with jax.set_mesh(mesh):
    return _measure(abstract_run(config, setup, mesh), there, only, done)


class Run(NamedTuple):
  """A run of which only shapes exist.

  Attributes:
    config: of the run.
    setup: of the run, wherever it lies.
    mesh: of its devices.
    programs: of a training step, by name.
    compiled: the same as functions that jax compiles.
    known: what they read, where it will lie: state, frozen, batch; then samples and rewards.
    text: bytes of the text encoders on one device.
  """

  config: Any
  setup: Setup
  mesh: Mesh
  programs: dict[str, Program]
  compiled: dict[str, Any]
  known: dict[str, Tree]
  text: float


class Traced(NamedTuple):
  """A program before compilation, on one device: see `Cost`; `turns` of loops of unknown length."""

  lowered: Any
  flops: float
  resident: float
  turns: int


def abstract_run(config: Any, setup: Setup, mesh: Mesh) -> Run:
  """The programs of `config` and what they read, placed on `mesh`, which must be set."""
  micro_batches(config)  # refuses a batch that does not split over the devices
  state = jax.eval_shape(lambda: initial_state(config, setup))
  offload = config.model.offload
  known = {
    "state": sharding.shard_on(state, mesh),
    "frozen": sharding.shard_on(setup.frozen, mesh).replace(
      bases=sharding.shard_on(setup.frozen.bases, mesh, offload=offload)
    ),
    "batch": _repeated(abstract_batch(config, setup), mesh),
  }
  text = _local_bytes(sharding.shard_on(setup.pipeline.text.params, mesh, offload=offload))
  programs = {program.name: program for program in step_programs(config, setup)}
  compiled = compile_programs(tuple(programs.values()), config.seed)
  return Run(
    config=config,
    setup=setup,
    mesh=mesh,
    programs=programs,
    compiled=compiled,
    known=known,
    text=text,
  )


def trace(run: Run, name: str) -> Traced:
  """Lowers the program `name`."""
  args = run.programs[name].arguments(run.known)
  traced = run.compiled[name].trace(*args)
  _, turns = loop_turns(name, len(run.config.dmd.timesteps))
  flops = count_flops(traced.jaxpr, turns) / run.mesh.size
  resident = run.text + _resident(run.known, args) + _unread(traced.jaxpr, args)
  return Traced(traced.lower(), flops, resident, turns)


def samples(run: Run, placed: Callable[[Tree], Tree]) -> Tree:
  """The rollout's result as the next programs find it, and the rewards made of it.

  Args:
    run: of stage 2.
    placed: from the result's shapes to the same with shardings.
  """
  args = run.programs["rollout"].arguments(run.known)
  made = placed(jax.eval_shape(run.compiled["rollout"], *args))
  count = run.config.batch.prompts * run.config.batch.images_per_prompt
  score = jax.ShapeDtypeStruct((count,), jnp.float32)
  host = {name: score for name in run.config.rewards if name not in made.rewards}
  return {"samples": made, "rewards": dict(made.rewards) | _repeated(host, run.mesh)}


def _measure(run: Run, there: Topology, only: str, done: Callable[[Cost], None]) -> dict[str, Any]:
  if only and only not in run.programs:
    raise UserError(f"--only is {only!r}; the programs are {', '.join(run.programs)}.")
  costs = []
  for name in run.programs:
    needed = only in ("", name) or (name == "rollout" and only in ("fake_score", "policy"))
    if not needed:
      continue
    cost, compiled = _cost(run, name, there)
    costs.append(cost)
    done(cost)
    if name == "rollout":
      run.known.update(samples(run, partial(_as_compiled, compiled, run.mesh)))
  return _report(run, there, costs)


def _as_compiled(compiled: Any, mesh: Mesh, shapes: Tree) -> Tree:
  if compiled is None:  # it was refused
    return _repeated(shapes, mesh)
  return jax.tree.map(_with, shapes, compiled.output_shardings)


def _with(shape: Any, where: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)


def _repeated(tree: Tree, mesh: Mesh) -> Tree:
  return jax.tree.map(lambda s: _with(s, NamedSharding(mesh, PartitionSpec())), tree)


def _local_bytes(tree: Tree) -> float:
  """Bytes of a tree on one device."""
  return float(
    sum(
      np.dtype(s.dtype).itemsize * math.prod(s.sharding.shard_shape(s.shape))
      for s in jax.tree.leaves(tree)
      if not sharding.on_host(s)
    )
  )


def _resident(known: dict[str, Tree], args: list[Tree]) -> float:
  """Bytes on one device of what is known but no argument."""
  taken = {id(tree) for tree in args}
  kept = [tree for key, tree in known.items() if key != "rewards" and id(tree) not in taken]
  return sum(_local_bytes(tree) for tree in kept)


def _cost(run: Run, name: str, there: Topology) -> tuple[Cost, Any]:
  """Compiles one program; no second result if it is too large for the compiler."""
  start = time.perf_counter()
  lowered, flops, resident, turns = trace(run, name)
  try:
    compiled, hlo = compile_to_text(lowered, there.options)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise UserError(
        f"the compiler itself failed on {name}, so it is not known whether it fits; try another"
        f" topology or batch ({str(error).splitlines()[0]})."
      ) from error
    reason = re.sub(r"^.*?(Ran out|Used)", r"\1", str(error).splitlines()[0])
    seconds = time.perf_counter() - start
    return Cost(name, False, reason, resident=resident, flops=flops, compile_seconds=seconds), None
  seconds = time.perf_counter() - start
  sizes = compiled.memory_analysis()
  moved = traffic(hlo, turns)
  arguments, code = sizes.argument_size_in_bytes, sizes.generated_code_size_in_bytes
  outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
  peak = arguments + outputs + sizes.temp_size_in_bytes + code + resident
  return Cost(
    name=name,
    fits=peak <= there.available,
    arguments=arguments,
    outputs=outputs,
    temporaries=sizes.temp_size_in_bytes,
    code=code,
    resident=resident,
    peak=peak,
    flops=flops,
    memory=moved.memory,
    sent=dict(moved.sent),
    collectives=dict(moved.count),
    kernels=dict(moved.kernels) if there.gpu else None,
    unknown_loops=moved.unknown_loops,
    times=roofline(there.chip, flops, moved.memory, sum(moved.sent.values())),
    compile_seconds=seconds,
  ), compiled


def compile_to_text(
  lowered: Any, options: Mapping[str, str | bool] = MappingProxyType({})
) -> tuple[Any, str]:
  """A compiled program and the text of its HLO.

  jaxlib cannot read back some asynchronous operations of a libtpu newer than itself; then the text
  is the one that libtpu itself writes.
  """
  with tempfile.TemporaryDirectory() as folder:
    compiled = lowered.compile({**options, "xla_dump_to": folder, "xla_dump_hlo_as_text": True})
    try:
      return compiled, compiled.as_text()
    except jax.errors.JaxRuntimeError:
      files = Path(folder).glob("*after_optimizations.txt")
      return compiled, max(files, key=lambda file: file.stat().st_size).read_text()


def _unread(jaxpr: Any, args: list[Tree]) -> float:
  """Bytes on one device of arguments that the program does not read; jax drops them."""
  inner = getattr(jaxpr, "jaxpr", jaxpr)
  read = {id(v) for eqn in inner.eqns for v in eqn.invars} | {id(v) for v in inner.outvars}
  leaves = jax.tree.leaves(args)
  unread = [s for v, s in zip(inner.invars, leaves, strict=True) if id(v) not in read]
  return _local_bytes(unread)


def _report(run: Run, there: Topology, costs: list[Cost]) -> dict[str, Any]:
  config, frozen = run.config, run.known["frozen"]
  trees = frozen_trees(config, run.setup, frozen)
  trees |= {"training state": run.known["state"]}
  return {
    "stage": config.stage,
    "topology": there.name,
    "notes": list(there.notes),
    "mesh": dict(run.mesh.shape),
    "chip": there.chip._asdict(),
    "available": there.available,
    "batch": config.batch.prompts * config.batch.images_per_prompt,
    "placement": [
      {"name": n, "parameters": c, "bytes": b, "local": local}
      for n, c, b, local in sharding.table(trees, run.mesh)
    ]
    + [{"name": "text encoders", "local": run.text}],
    "programs": [asdict(cost) for cost in costs],
    "fits": all(cost.fits for cost in costs),
  }
