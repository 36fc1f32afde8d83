"""Samplers over a velocity: few stochastic steps, or many Euler steps."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
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
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_UNSUPPORTED = (
  "use_karras_sigmas",
  "use_exponential_sigmas",
  "use_beta_sigmas",
  "invert_sigmas",
  "stochastic_sampling",
)

_TIME_SHIFTS = ("exponential", "linear")
# All keys of the scheduler; an unknown one may mean another schedule.
_KEYS = {
  *_UNSUPPORTED,
  *_FLUX1_CONSTANTS,
  "num_train_timesteps",
  "shift",
  "shift_terminal",
  "time_shift_type",
  "use_dynamic_shifting",
}


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
  def from_config(
    cls,
    family: str,
    config: Mapping[str, Any],
    *,
    source: str | os.PathLike = "scheduler_config.json",
  ) -> "Schedule":
    """Reads scheduler_config.json of diffusers' `FlowMatchEulerDiscreteScheduler`.

    Args:
      family: see the class.
      config: contents of the file.
      source: the file, for error messages.

    Raises:
      UserError: another scheduler, or an option or value that is not supported for the family.
    """
    check_scheduler(config.get("_class_name", SCHEDULER), source)
    dynamic = config.get("use_dynamic_shifting") or False
    terminal = config.get("shift_terminal") or None
    for key in _wrong_keys(family, config, dynamic=bool(dynamic), terminal=terminal):
      raise UserError(f"{source}: {key} = {config[key]!r} is not supported for {family}.")
    shift = config.get("shift", 1.0)
    time_shift = config.get("time_shift_type", _TIME_SHIFTS[0])
    return cls(family, float(shift), bool(dynamic), time_shift, terminal)

  def few_step_sigmas(self, steps: Sequence[float], image_tokens: int) -> np.ndarray:
    """Levels [K + 1] of K steps in (0, 1000], with the final 0.

    Args:
      steps: decreasing.
      image_tokens: 2 x 2 packed image tokens.

    Raises:
      UserError: a single step where the schedule is stretched to a terminal level.
    """
    if not self.dynamic:
      return few_step_sigmas(steps, shift=self.shift)
    if self.terminal is not None and len(steps) < 2:
      raise UserError(
        f"the scheduler's shift_terminal = {self.terminal} cannot be reached in {len(steps)} step;"
        " take more steps."
      )
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


def check_scheduler(name: Any, source: str | os.PathLike) -> None:
  """Raises UserError for a scheduler class, named in `source`, whose steps are not taken."""
  if name != SCHEDULER:
    raise UserError(
      f"{source}: the scheduler is {name!r}, but images are drawn with {SCHEDULER}'s steps alone;"
      " take the scheduler that the model was published with."
    )


def _wrong_keys(
  family: str, config: Mapping[str, Any], *, dynamic: bool, terminal: Any
) -> Iterator[str]:
  """Keys of a scheduler's config whose values are not honoured."""
  # Later releases add keys; one that is off or empty changes nothing.
  yield from (k for k in config if k[:1] != "_" and k not in _KEYS and config[k])
  yield from (key for key in _UNSUPPORTED if config.get(key))
  # The networks' time is 1000 times the noise level.
  if config.get("num_train_timesteps", 1000) != schedules.NUM_TRAIN_TIMESTEPS:
    yield "num_train_timesteps"
  if not _is_number(config.get("shift", 1.0)) or config.get("shift", 1.0) <= 0:
    yield "shift"
  if config.get("time_shift_type", _TIME_SHIFTS[0]) not in _TIME_SHIFTS:
    yield "time_shift_type"
  if config.get("use_dynamic_shifting") not in (None, False, True) or (
    dynamic and family not in _DYNAMIC
  ):
    yield "use_dynamic_shifting"
  if terminal is not None and not (dynamic and _is_number(terminal) and 0 < terminal < 1):
    yield "shift_terminal"
  if dynamic and family == "flux1":
    yield from (k for k, v in _FLUX1_CONSTANTS.items() if config.get(k, v) != v)


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def checked_images(
  decode: Callable[..., jax.Array], latents: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Images [B, H, W, 3] in [0, 1] of clean latents, and whether each is made of numbers, [B] bool.

  Clamping hides infinities and eight bits hide NaN, so this is to be computed where images are.

  Args:
    decode: `vae.decode_images` of an autoencoder and its parameters.
    latents: [B, h, w, C].
  """
  images = decode(latents, clamp=False)
  finite = jnp.isfinite(latents).all((1, 2, 3)) & jnp.isfinite(images).all((1, 2, 3))
  return jnp.clip(images, 0.0, 1.0), finite


def refuse_nonfinite(finite: np.ndarray, names: Sequence[str]) -> None:
  """Raises UserError that names the images which are not made of numbers.

  Args:
    finite: [B] bool, of `checked_images`.
    names: of the first images; more than these are not looked at.
  """
  bad = [name for name, fine in zip(names, finite, strict=False) if not fine]
  if bad:
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    raise UserError(
      f"the image of prompt {', '.join(bad[:3])}{more} has values that are not finite; look for"
      " such values in the weights and adapters, or draw in float32."
    )


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
