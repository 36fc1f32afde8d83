"""Held-out scores of several systems on the same prompts and seeds.

Nothing that a reward does, and in a run of one process nothing that a device does, ends an
evaluation: what failed is NaN, counted and named.
"""

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from rtdmd_jax.algo.subgrpo import sample_noise
from rtdmd_jax.algo.transitions import add_noise, x0_from_v
from rtdmd_jax.datasets.prompts import Prompt
from rtdmd_jax.errors import UserError
from rtdmd_jax.evaluate.scores import PromptScores, _differences, table_row
from rtdmd_jax.pipeline import sampling
from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.pipeline.velocity import role_variables, role_velocity
from rtdmd_jax.report.scores import System
from rtdmd_jax.rewards.held_out_sets import HeldOut
from rtdmd_jax.rewards.isolated import Scores, attempt, beside, left_out, missing, sentence
from rtdmd_jax.rewards.per_process import score_shared
from rtdmd_jax.runtime.compilation import jit
from rtdmd_jax.runtime.multihost import is_main
from rtdmd_jax.runtime.sharding import replicate, to_numpy
from rtdmd_jax.training.setup import Setup
from rtdmd_jax.training.velocities import fake_score_velocity

Tree = Any
# Noise level of the shown predictions of the fake score: composition is settled, details are not.
PREDICTION_SIGMA = 0.7
_NOT_FINITE = "its score is not finite"


class Look(NamedTuple):
  """A system's images and scores in an evaluation.

  Attributes:
    images: [P, H, W, 3] uint8; None if they could not be drawn.
    scores: of each reward that was asked for.
    problem: what is wrong with the images, or "".
  """

  images: np.ndarray | None
  scores: Scores
  problem: str


class Evaluator:
  """Samples and scores; compiles one program a kind of system."""

  def __init__(self, setup: Setup, config: Any):
    self._setup, self._config = setup, config
    self._programs: dict[tuple, Callable] = {}
    self._fixed: dict[tuple, np.ndarray] = {}
    device = {**setup.scoring.device, **setup.watched}
    self._scores = {name: jax.jit(_of_bytes(score)) for name, score in device.items()}

  def look(
    self,
    system: System,
    prompts: Sequence[Prompt],
    rewards: Collection[str],
    more: Sequence[Prompt] = (),
  ) -> Look:
    """Draws a system's images of `prompts` and then of `more`, and scores the former by `rewards`.

    Of several processes an error of the device ends all: one that left a joint program alone would
    leave the others waiting.
    """
    count = len(prompts)
    try:
      images, finite = self._draw(self._program(system), system.adapters, [*prompts, *more])
    except Exception as error:
      if jax.process_count() > 1:
        raise
      problem = f"the images could not be drawn: {sentence(error)}"
      return Look(None, missing(count, dict.fromkeys(rewards, problem)), problem)
    scores = self.scores(images[:count], prompts, rewards)
    scores = scores.where(finite[:count], "the image has pixels that are not finite")
    bad = int((~finite).sum())
    return Look(images, scores, f"{bad} of {len(finite)} images are not finite" if bad else "")

  def images(self, system: System, prompts: Sequence[Prompt]) -> np.ndarray:
    """Images [P, H, W, 3] uint8; image i depends on the evaluation seed and i alone."""
    return self._draw(self._program(system), system.adapters, prompts)[0]

  def teacher_images(self, system: System, prompts: Sequence[Prompt]) -> np.ndarray:
    """`images` of a system that training does not change: drawn once for the same prompts."""
    key = (*system.kind(), *(p.text for p in prompts))
    if key not in self._fixed:
      self._fixed = {key: self.images(system, prompts)}
    return self._fixed[key]

  def predictions(self, system: System, fake_score: Tree, prompts: Sequence[Prompt]) -> np.ndarray:
    """The fake score's predictions of the system's images, [P, H, W, 3] uint8.

    The clean image it predicts from each of `images(system, prompts)` with noise of level
    `PREDICTION_SIGMA`; the noise depends on the evaluation seed and the image's number alone.

    Args:
      system: a few-step generator.
      fake_score: its adapters in training.
      prompts: P prompts.
    """
    key = ("predictions", *system.kind())
    if key not in self._programs:
      self._programs[key] = self._compile(system, predict=True)
    return self._draw(self._programs[key], (system.adapters, fake_score), prompts)[0]

  def _draw(
    self, program: Callable, adapters: Tree, prompts: Sequence[Prompt]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Images [P, H, W, 3] uint8, and which of them came from finite pixels [P]."""
    chunk = min(self._config.eval.chunk, len(prompts))
    parts = []
    for start in range(0, len(prompts), chunk):
      index = np.minimum(np.arange(start, start + chunk), len(prompts) - 1).astype(np.uint32)
      encoded = self._setup.cache([prompts[i].text for i in index])["conditioning"]
      inputs = replicate((encoded, index))
      parts.append(to_numpy(program(self._setup.frozen, adapters, *inputs)))
    images, finite = map(np.concatenate, zip(*parts, strict=True))
    return images[: len(prompts)], finite[: len(prompts)]

  def _program(self, system: System) -> Callable:
    key = system.kind()
    if key not in self._programs:
      self._programs[key] = self._compile(system)
    return self._programs[key]

  def _compile(self, system: System, *, predict: bool = False) -> Callable:
    setup = self._setup
    embedded = setup.roles.embedded_guidance
    guided = system.guidance > 1.0 and not embedded
    # A program may not hold arrays of several processes.
    unconditional = to_numpy(setup.unconditional) if guided else None

    def run(frozen, adapters, conditioning: Conditioning, index: jax.Array) -> tuple:
      adapters, fake_score = adapters if predict else (adapters, None)
      variables = role_variables(frozen.bases[system.base]) | adapters
      velocity = role_velocity(
        setup.roles.apply,
        variables,
        conditioning,
        unconditional=unconditional,
        guidance=system.guidance,
        embedded_guidance=embedded,
      )
      key = jax.random.key(self._config.eval.seed)
      latents = sampling.sample(
        velocity, key, index, setup.roles.latent_shape, system.sigmas, eta=system.eta
      )
      if predict:
        fake = fake_score_velocity(setup.roles, frozen, fake_score, conditioning)
        noise = sample_noise(jax.random.fold_in(key, 1), index, setup.roles.latent_shape)
        noisy = add_noise(latents, noise, PREDICTION_SIGMA)
        sigma = jnp.full(index.shape, PREDICTION_SIGMA)
        latents = x0_from_v(noisy, fake(noisy, sigma), sigma)
      images = setup.scoring.decode(frozen.vae, latents)
      finite = jnp.isfinite(images).all((1, 2, 3)) & jnp.isfinite(latents).all((1, 2, 3))
      return jnp.round(255.0 * images).astype(jnp.uint8), finite

    return jit(run)

  def scores(
    self, images: np.ndarray, prompts: Sequence[Prompt], rewards: Collection[str] | None = None
  ) -> Scores:
    """Scores [P] of uint8 images by `rewards`, or by all, trained or watched."""
    setup, count = self._setup, len(prompts)
    names = self.rewards if rewards is None else rewards
    parts = [self._device_score(n, images, prompts) for n in self._scores if n in names]
    parts.append(left_out(count, {n: r for n, r in setup.unavailable.items() if n in names}))
    for host in (setup.host_rewards, setup.watched_host):
      own = [] if host is None else [n for n in host.names if n in names]
      if own:
        parts.append(score_shared(host, images, prompts, own))
    return beside(parts)

  @property
  def rewards(self) -> list[str]:
    """Names of all rewards, those that could not be built among them."""
    hosts = [h.names for h in (self._setup.host_rewards, self._setup.watched_host) if h is not None]
    return [*self._scores, *self._setup.unavailable, *(name for own in hosts for name in own)]

  def _device_score(self, name: str, images: np.ndarray, prompts: Sequence[Prompt]) -> Scores:
    setup, chunk = self._setup, self._config.eval.chunk

    def compute() -> np.ndarray:
      parts = []
      for start in range(0, len(prompts), chunk):
        index = np.minimum(np.arange(start, start + chunk), len(prompts) - 1)
        features = setup.cache([prompts[i].text for i in index])["reward_text"][name]
        inputs = replicate((images[index], features))
        parts.append(to_numpy(self._scores[name](setup.frozen.rewards[name], *inputs)))
      return np.concatenate(parts)[: len(prompts)]

    if jax.process_count() > 1:  # see `look`
      values = compute()
      return attempt(name, lambda: values, len(prompts), _NOT_FINITE)
    try:
      return attempt(name, compute, len(prompts), _NOT_FINITE)
    except UserError as error:
      return missing(len(prompts), {name: sentence(error)})

  def compare(
    self, systems: Sequence[System], sets: Sequence[HeldOut], workdir: Path, repeats: int = 1
  ) -> dict:
    """Scores every system on every set; writes `evaluation.json` and images of the first set.

    Each prompt counts once, with the mean of its `repeats` images. `differences` are those of the
    last system from each of the others, prompt by prompt.

    Returns:
      The table; what went wrong is in it.
    """
    judged: list[list[PromptScores]] = [[] for _ in systems]
    shown = self._config.eval.preview
    for number, part in enumerate(sets):
      for system, own in zip(systems, judged, strict=True):
        seen = self.look(system, [*part.prompts] * repeats, part.rewards)
        own.append(PromptScores.of(seen.scores, part.prompts))
        if seen.problem:
          print(f"warning: {system.name}, prompts of {part.path}: {seen.problem}")
        if number == 0 and seen.images is not None and is_main():
          _save_images(seen.images[:shown], workdir / "evaluation" / system.name)
    table = {
      "systems": [table_row(system, own) for system, own in zip(systems, judged, strict=True)],
      "prompts": [p.text for p in sets[0].prompts[:shown]],
      "differences": {
        system.name: _differences(judged[-1], own)
        for system, own in zip(systems[:-1], judged[:-1], strict=True)
      },
    }
    if is_main():
      (workdir / "evaluation.json").write_text(json.dumps(table, indent=2))
    return table


def _save_images(images: np.ndarray, directory: Path) -> None:
  try:
    directory.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
      Image.fromarray(image).save(directory / f"{i}.png")
  except OSError as error:
    print(f"warning: images cannot be written to {directory}: {error}")


def _of_bytes(score: Callable) -> Callable:
  """A device reward of 8-bit images."""
  return lambda params, images, text: score(params, images.astype(jnp.float32) / 255.0, text)
