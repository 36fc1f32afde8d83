"""Samplers over a velocity: few stochastic steps, or many Euler steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.algo import schedules
from rtdmd_jax.algo.rollout import Velocity, batched
from rtdmd_jax.algo.subgrpo import sample_noise
from rtdmd_jax.algo.transitions import cps_step
from rtdmd_jax.errors import UserError

_DYNAMIC = {"flux1": schedules.flux1_sigmas, "flux2": schedules.flux2_sigmas}
# FLUX.1's constants under the names of a scheduler's config.
_FLUX1_CONSTANTS = dict(
  zip(
    ("base_image_seq_len", "base_shift", "max_image_seq_len", "max_shift"),
    (*schedules.FLUX1_BASE, *schedules.FLUX1_MAX),
    strict=True,
  )
)
_UNSUPPORTED = (
  "use_karras_sigmas",
  "use_exponential_sigmas",
  "use_beta_sigmas",
  "invert_sigmas",
  "stochastic_sampling",
)


def few_step_sigmas(steps: Sequence[float], *, shift: float) -> np.ndarray:
  """The few-step schedule [K + 1] of SD3, with the final 0."""
  return np.append(np.asarray(schedules.sd3_sigmas(list(steps), shift=shift)), 0.0).astype(
    np.float32
  )


def euler_sigmas(num_steps: int, *, shift: float) -> np.ndarray:
  """diffusers' `FlowMatchEulerDiscreteScheduler` schedule [num_steps + 1], with the final 0.

  Its lowest level is shifted twice, as in diffusers.
  """

  def shifted(sigma):
    return shift * sigma / (1 + (shift - 1) * sigma)

  sigmas = shifted(np.linspace(1.0, shifted(1e-3), num_steps))
  return np.append(sigmas, 0.0).astype(np.float32)


@dataclass(frozen=True)
class Schedule:
  """The noise levels of a pretrained pipeline, which may depend on the size of the image.

  Attributes:
    family: "sd3", "flux1" or "flux2".
    shift: the static shift, used where `dynamic` is not set.
    dynamic: the shift depends on the number of image tokens.
    time_shift: the kind of dynamic shift, "exponential" or "linear".
    terminal: the level that a dynamic schedule is stretched to end at, if any.
  """

  family: str
  shift: float = 1.0
  dynamic: bool = False
  time_shift: str = "exponential"
  terminal: float | None = None

  @classmethod
  def from_config(cls, family: str, config: Mapping[str, Any]) -> "Schedule":
    """Reads scheduler_config.json of diffusers' `FlowMatchEulerDiscreteScheduler`.

    Raises:
      UserError: an option that is not supported for the family.
    """
    dynamic = bool(config.get("use_dynamic_shifting"))
    terminal = config.get("shift_terminal") or None
    wrong = [key for key in _UNSUPPORTED if config.get(key)]
    if dynamic and family not in _DYNAMIC:
      wrong.append("use_dynamic_shifting")
    if terminal is not None and not dynamic:
      wrong.append("shift_terminal")
    if dynamic and family == "flux1":
      wrong += [k for k, v in _FLUX1_CONSTANTS.items() if config.get(k, v) != v]
    if wrong:
      raise UserError(
        f"scheduler_config.json: {wrong[0]} = {config[wrong[0]]!r} is not supported for {family}."
      )
    time_shift = config.get("time_shift_type", "exponential")
    return cls(family, float(config.get("shift", 1.0)), dynamic, time_shift, terminal)

  def few_step_sigmas(self, steps: Sequence[float], image_tokens: int) -> np.ndarray:
    """Levels [K + 1] of K steps in (0, 1000], with the final 0.

    Args:
      steps: decreasing.
      image_tokens: 2 x 2 packed image tokens.
    """
    if not self.dynamic:
      return few_step_sigmas(steps, shift=self.shift)
    sigmas = _DYNAMIC[self.family](
      list(steps),
      image_tokens=image_tokens,
      time_shift=self.time_shift,
      shift_terminal=self.terminal,
    )
    return np.append(np.asarray(sigmas), 0.0).astype(np.float32)

  def euler_sigmas(self, num_steps: int, image_tokens: int) -> np.ndarray:
    """Levels [num_steps + 1] as the family's diffusers pipeline sets them, with the final 0."""
    if self.family == "sd3":
      return euler_sigmas(num_steps, shift=self.shift)
    # The FLUX pipelines hand their scheduler an even grid that ends one step above 0.
    return self.few_step_sigmas(1000.0 * np.linspace(1.0, 1.0 / num_steps, num_steps), image_tokens)


def sample(
  velocity: Velocity,
  key: jax.Array,
  index: jax.Array,
  shape: tuple[int, ...],
  sigmas: jax.Array,
  *,
  eta: float,
) -> jax.Array:
  """Clean latents [B, *shape] from noise along `sigmas` [K + 1]; `eta` 0 is the Euler method.

  Every image's noise is a function of `key` (one for all, or one an image, [B]) and its `index` [B]
  alone.
  """
  sigmas = jnp.asarray(sigmas, jnp.float32)
  over_images = jax.vmap if key.ndim else lambda function: function
  keys = over_images(jax.random.split)(key)
  start_key, step_key = keys[..., 0], keys[..., 1]

  def step(i: jax.Array, x: jax.Array) -> jax.Array:
    v = velocity(x, batched(sigmas[i], x)).astype(jnp.float32)
    noise = 0.0
    if eta:
      step_keys = over_images(lambda k: jax.random.fold_in(k, i))(step_key)
      noise = sample_noise(step_keys, index, shape)
    return cps_step(x, v, sigmas[i], sigmas[i + 1], eta, noise)

  start = sample_noise(start_key, index, shape)
  return jax.lax.fori_loop(0, sigmas.shape[0] - 1, step, start)
