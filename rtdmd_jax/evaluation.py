"""Held-out scores of several systems on the same prompts and seeds."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from rtdmd_jax import sampling
from rtdmd_jax.algo.subgrpo import sample_noise
from rtdmd_jax.algo.transitions import add_noise, x0_from_v
from rtdmd_jax.build import Setup
from rtdmd_jax.compilation import jit
from rtdmd_jax.hosts import is_main
from rtdmd_jax.models.lora import fold_scale
from rtdmd_jax.prompts import Prompt
from rtdmd_jax.rewards.spread import score_shared
from rtdmd_jax.roles import role_variables, role_velocity
from rtdmd_jax.sharding import fetch, replicate
from rtdmd_jax.stage1 import fake_score_velocity
from rtdmd_jax.state import Conditioning

Tree = Any
# Noise level of the shown predictions of the fake score: composition is settled, details are not.
PREDICTION_SIGMA = 0.7


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


class Evaluator:
  """Samples and scores; compiles one program a kind of system."""

  def __init__(self, setup: Setup, config: Any):
    self._setup, self._config = setup, config
    self._programs: dict[tuple, Callable] = {}
    self._fixed: dict[tuple, np.ndarray] = {}
    device = {**setup.scoring.device, **setup.watched}
    self._scores = {name: jax.jit(_of_bytes(score)) for name, score in device.items()}

  def images(self, system: System, prompts: Sequence[Prompt]) -> np.ndarray:
    """Images [P, H, W, 3] uint8; image i depends on the evaluation seed and i alone."""
    return self._draw(self._program(system), system.adapters, prompts)

  def teacher_images(self, system: System, prompts: Sequence[Prompt]) -> np.ndarray:
    """`images` of a system that training does not change: drawn once for the same prompts."""
    key = (*system.kind(), *(p.text for p in prompts))
    if key not in self._fixed:
      self._fixed = {key: self.images(system, prompts)}
    return self._fixed[key]

  def predictions(self, system: System, fake_score: Tree, prompts: Sequence[Prompt]) -> np.ndarray:
    """What the fake score takes the system's images for, [P, H, W, 3] uint8.

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
    return self._draw(self._programs[key], (system.adapters, fake_score), prompts)

  def _draw(self, program: Callable, adapters: Tree, prompts: Sequence[Prompt]) -> np.ndarray:
    chunk = min(self._config.eval.chunk, len(prompts))
    parts = []
    for start in range(0, len(prompts), chunk):
      index = np.minimum(np.arange(start, start + chunk), len(prompts) - 1).astype(np.uint32)
      encoded = self._setup.cache([prompts[i].text for i in index])["conditioning"]
      inputs = replicate((encoded, index))
      parts.append(fetch(program(self._setup.frozen, adapters, *inputs)))
    return np.concatenate(parts)[: len(prompts)]

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
    unconditional = fetch(setup.unconditional) if guided else None

    def run(frozen, adapters, conditioning: Conditioning, index: jax.Array) -> jax.Array:
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
      return jnp.round(255.0 * images).astype(jnp.uint8)

    return jit(run)

  def scores(self, images: np.ndarray, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
    """Every configured reward [P] of uint8 images, trained or watched."""
    setup, chunk = self._setup, self._config.eval.chunk
    texts = [p.text for p in prompts]
    result = {}
    for name, program in self._scores.items():
      features = setup.cache(texts)["reward_text"][name]
      parts = []
      for start in range(0, len(prompts), chunk):
        index = np.minimum(np.arange(start, start + chunk), len(prompts) - 1)
        inputs = replicate((images[index], features[index]))
        parts.append(fetch(program(setup.frozen.rewards[name], *inputs)))
      result[name] = np.concatenate(parts)[: len(prompts)]
    for host in (setup.host_rewards, setup.watched_host):
      if host is not None:
        result |= score_shared(host, images, prompts)
    return result

  def compare(
    self, systems: Sequence[System], prompts: Sequence[Prompt], workdir: Path, repeats: int = 1
  ) -> dict:
    """Scores every system; writes `evaluation.json` and images, and returns the table.

    Each prompt counts once, with the mean of its `repeats` images. `differences` are those of the
    last system from each of the others, prompt by prompt.
    """
    scores = []
    for system in systems:
      images = self.images(system, [*prompts] * repeats)
      values = self.scores(images, [*prompts] * repeats)
      scores.append({name: prompt_means(v, len(prompts)) for name, v in values.items()})
      if is_main():
        _save_images(images[: self._config.eval.preview], workdir / "evaluation" / system.name)
    table = {
      "systems": [row(s, values, prompts) for s, values in zip(systems, scores, strict=True)],
      "prompts": [p.text for p in prompts[: self._config.eval.preview]],
      "differences": {
        system.name: {name: _summary(scores[-1][name] - v) for name, v in values.items()}
        for system, values in zip(systems[:-1], scores[:-1], strict=True)
      },
    }
    if is_main():
      (workdir / "evaluation.json").write_text(json.dumps(table, indent=2))
    return table


def _save_images(images: np.ndarray, directory: Path) -> None:
  directory.mkdir(parents=True, exist_ok=True)
  for i, image in enumerate(images):
    Image.fromarray(image).save(directory / f"{i}.png")


def _of_bytes(score: Callable) -> Callable:
  """A device reward of 8-bit images."""
  return lambda params, images, text: score(params, images.astype(jnp.float32) / 255.0, text)


def prompt_means(values: np.ndarray, count: int) -> np.ndarray:
  """Mean score [P] of each of `count` prompts, NaN where no image of it has one.

  Args:
    values: [R * P], all prompts one after the other, R times; NaN where there is no score.
    count: P.
  """
  values = values.reshape(-1, count)
  known = np.isfinite(values)
  total = np.where(known, values, 0.0).sum(0)
  return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


def row(system: Any, scores: dict[str, np.ndarray], prompts: Sequence[Prompt]) -> dict:
  """A system's line of the table: name, steps, guidance, and each reward's mean, also by tag.

  Args:
    system: has `name`, `steps` and `guidance`.
    scores: [P] of each reward, NaN where there is none.
    prompts: of the images.
  """
  tags = np.array([(p.record or {}).get("tag", "") for p in prompts])
  per_tag = {
    str(tag): {name: _summary(values[tags == tag]) for name, values in scores.items()}
    for tag in dict.fromkeys(tags)
    if tag
  }
  return {
    "name": system.name,
    "steps": system.steps,
    "guidance": system.guidance,
    "scores": {name: _summary(values) for name, values in scores.items()},
    "per_tag": per_tag,
  }


def _summary(values: np.ndarray) -> dict:
  """Mean of the finite values, half width of its 95 % interval, and their number."""
  values = values[np.isfinite(values)].astype(np.float64)
  if not len(values):
    return {"mean": None, "ci95": None, "n": 0}
  ci = 1.96 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
  return {"mean": float(values.mean()), "ci95": ci, "n": len(values)}


def score_text(score: dict[str, float | None]) -> str:
  """A row's mean with its 95 % interval, as far as enough samples could be scored."""
  if score["mean"] is None:
    return "failed"
  interval = "" if score["ci95"] is None else f" ± {score['ci95']:.4f}"
  return f"{score['mean']:.4f}{interval}"
