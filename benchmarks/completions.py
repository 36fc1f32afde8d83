"""Where the few-step generator loses quality: the teacher finishes its rollouts.

python -m benchmarks.completions --config=configs/tiny_stage2.py --images=2

Row k: the first k steps are the cold start's, the rest are Euler steps of the teacher with guidance
from the level reached. Means over held-out prompts and their 95 % intervals; the last row is the
generator alone.
"""

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np

from rtdmd_jax.algo.subgrpo import sample_noise
from rtdmd_jax.algo.transitions import cps_step
from rtdmd_jax.config import load_config
from rtdmd_jax.evaluate import systems
from rtdmd_jax.evaluate.evaluator import Evaluator
from rtdmd_jax.evaluate.scores import prompt_means
from rtdmd_jax.pipeline.velocity import role_variables, role_velocity
from rtdmd_jax.runtime import sharding
from rtdmd_jax.training.setup import build

EULER_STEPS = 24


def completed(setup, config, steps: int):
  """A program from (frozen, conditioning, index) to uint8 images after `steps` generator steps."""
  cold, teacher = systems.generator(setup, config, "", None), systems.teacher(setup, config)
  unconditional = jax.device_get(setup.unconditional)
  # The teacher's own grid, scaled to begin at the level reached; nothing is left to do at level 0.
  rest = setup.pipeline.euler_sigmas(EULER_STEPS, config.model.image_size)
  rest = rest * cold.sigmas[steps] if cold.sigmas[steps] else rest[:0]

  @jax.jit
  def run(frozen, conditioning, index):
    base = role_variables(frozen.bases[cold.base]) | cold.adapters
    few = role_velocity(setup.roles.apply, base, conditioning)
    many = role_velocity(
      setup.roles.apply, role_variables(frozen.bases[teacher.base]), conditioning,
      unconditional=unconditional, guidance=teacher.guidance,
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(config.eval.seed), len(cold.sigmas))
    z = [sample_noise(key, index, setup.roles.latent_shape) for key in keys]
    level = lambda sigma: jnp.full(index.shape, sigma)  # noqa: E731
    x = z[-1]
    for i in range(steps):
      sigma, after = cold.sigmas[i], cold.sigmas[i + 1]
      x = cps_step(x, few(x, level(sigma)), sigma, after, cold.eta, z[i])
    for sigma, after in zip(rest[:-1], rest[1:], strict=True):
      x = x + (after - sigma) * many(x, level(sigma))
    return jnp.round(255.0 * setup.scoring.decode(frozen.vae, x)).astype(jnp.uint8)

  return run


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--config", required=True)
  parser.add_argument("--images", type=int, default=2, help="of a prompt")
  options, overrides = parser.parse_known_args()
  config = load_config(options.config, [o.removeprefix("--config.") for o in overrides])
  with jax.set_mesh(sharding.make_mesh(**config.mesh)):
    setup = build(config)
    evaluator, prompts = Evaluator(setup, config), [*setup.held_out] * options.images
    names = sorted(setup.scoring.weights)
    print(
      f"| generator steps | then from level | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}"
    )
    sigmas = np.asarray(setup.roles.sigmas)
    for steps in range(len(sigmas)):
      program = completed(setup, config, steps)
      parts = []
      for start in range(0, len(prompts), config.eval.chunk):
        rows = range(start, start + config.eval.chunk)
        index = np.minimum(rows, len(prompts) - 1).astype(np.uint32)
        encoded = setup.cache([prompts[i].text for i in index])["conditioning"]
        parts.append(np.asarray(program(setup.frozen, encoded, index)))
      scores = evaluator.scores(np.concatenate(parts)[: len(prompts)], prompts).values
      cells = []
      for name in names:
        means = prompt_means(scores[name], len(setup.held_out))
        error = 1.96 * means.std(ddof=1) / math.sqrt(len(means))
        cells.append(f"{means.mean():.3f} ± {error:.3f}")
      print(f"| {steps} | {sigmas[steps]:.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
  main()
