"""Systems that are compared: adapters of one role with a sampler."""

from typing import Any, NamedTuple

import jax
import numpy as np

from rtdmd_jax.adapters.lora import fold_scale
from rtdmd_jax.training.setup import Setup

Tree = Any


class System(NamedTuple):
  """A way to make images: Euler steps of the base with guidance, or the few-step generator."""

  name: str
  steps: int
  guidance: float
  sigmas: np.ndarray
  eta: float
  base: str  # key in `Frozen.bases`
  adapters: Tree  # {"lora_frozen": ..., "lora": ...}, either may be missing

  def kind(self) -> tuple:
    """Equal for systems that differ in the values of their adapters alone: one program serves."""
    structure = jax.tree.structure(self.adapters)
    return self.steps, self.guidance, tuple(self.sigmas.tolist()), self.eta, self.base, structure


def teacher(setup: Setup, config: Any) -> System:
  """The base with classifier-free guidance and many Euler steps."""
  steps, guidance = config.eval.teacher_steps, config.eval.teacher_guidance
  sigmas = setup.pipeline.euler_sigmas(steps, config.model.image_size)
  return System("teacher", steps, guidance, sigmas, 0.0, setup.roles.teacher, {})


def generator(setup: Setup, config: Any, name: str, adapters: Tree) -> System:
  """The few-step generator with `adapters` on top of the earlier stage's."""
  variables = {"lora_frozen": setup.frozen.generator} if setup.frozen.generator else {}
  if adapters is not None:
    variables["lora"] = fold_scale(adapters, config.lora.alpha)
  sigmas = np.asarray(setup.roles.sigmas)
  base = setup.roles.generator
  return System(name, len(sigmas) - 1, 1.0, sigmas, config.dmd.eta, base, variables)
