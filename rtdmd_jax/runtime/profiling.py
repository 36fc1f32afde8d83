"""A window of a run's steps as a profile for TensorBoard, XProf or Perfetto."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from rtdmd_jax.errors import UserError

FOLDER = "profile"


def profiled(step: Callable[..., tuple], train: Any, workdir: Path) -> Callable[..., tuple]:
  """`step`, of which `train.profile_steps` calls from step `train.profile_start` on are traced.

  The device is waited for at the window's edges, so that it holds its own steps alone. A run that
  starts inside the window traces the rest of it.

  Args:
    step: called as (state, batch, prompts, number), `number` counting from 0.
    train: section of the configuration; `profile_start` counts steps from 1, as the metrics do.
    workdir: folder of the run; the trace goes to its folder `profile`.

  Raises:
    UserError: the window does not lie within the run.
  """
  first, last = train.profile_start, train.profile_start + train.profile_steps - 1
  if train.profile_steps == 0:
    return step
  if not 1 <= first <= last <= train.steps:
    raise UserError(
      f"train.profile_start is {first} and train.profile_steps {train.profile_steps}; the window"
      f" must lie within the {train.steps} steps of the run."
    )
  tracing = False

  def run(state: Any, batch: Any, prompts: Any, number: int) -> tuple:
    nonlocal tracing
    if first <= number + 1 <= last and not tracing:
      jax.block_until_ready(state)
      jax.profiler.start_trace(workdir / FOLDER)
      tracing = True
    with jax.profiler.StepTraceAnnotation("step", step_num=number + 1):
      result = step(state, batch, prompts, number)
    if tracing and number + 1 == last:
      jax.block_until_ready(result)
      jax.profiler.stop_trace()
      tracing = False
      print(f"profile of steps {first} to {last}: {workdir / FOLDER}")
    return result

  return run
