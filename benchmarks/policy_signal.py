"""How much signal a policy gradient has, and what the rewards agree on, at the start of a run.

python -m benchmarks.policy_signal --config=configs/tiny_stage2.py --batches=8 --steps=0-0,0-2

For each range of stochastic steps (all of it trains) and each reward alone: the mean cosine of the
policy gradients of independent batches with its standard error, and that of the means of two halves
of them. Then the correlation of every pair of rewards within a prompt's group.
"""

import argparse
import itertools
from dataclasses import replace

import jax
import numpy as np
import optax

from rtdmd_jax.config import load_config
from rtdmd_jax.runtime import sharding
from rtdmd_jax.training.optim import Optimizers
from rtdmd_jax.training.setup import Setup, build, dmd_config, policy_config
from rtdmd_jax.training.stage2 import Stage2
from rtdmd_jax.training.stages import initial_state, step_batch


def score(setup: Setup, samples, prompts) -> dict[str, np.ndarray]:
  """Every reward [N] of a rollout."""
  rewards = jax.device_get(samples.rewards)
  if setup.host_rewards is not None:
    texts, records = [p.text for p in prompts], [p.record for p in prompts]
    scored = setup.host_rewards(jax.device_get(samples.images), texts, records)
    rewards |= {name: np.asarray(scored[name]) for name in setup.host_rewards.weights}
  return rewards


def policy_programs(config, setup: Setup, policy):
  """The state at the start, the rollout, and a maker of programs for the flat policy gradient [P].

  The maker takes the rewards (`LatentRewards`); its programs take what `Stage2.policy_step` takes.
  """
  plain = optax.sgd(1.0)  # an update by it is the gradient
  state = jax.jit(lambda: initial_state(config, setup))()
  state = state.replace(generator_opt=plain.init(state.generator))
  stage = Stage2(
    setup.roles, dmd_config(config, setup.pipeline), policy, setup.scoring, Optimizers(plain, plain)
  )
  rollout = jax.jit(stage.collect_rollout)

  def gradient(scoring):
    def run(*args):
      new, _ = replace(stage, rewards=scoring).policy_step(*args)
      change = jax.tree.map(lambda a, b: (a - b).ravel(), state.generator, new.generator)
      return jax.numpy.concatenate(jax.tree.leaves(change))

    return jax.jit(run)

  return state, rollout, gradient


def gradients(config, setup: Setup, policy, count: int):
  """Flat policy gradients [count, P] of each reward alone, and the rewards of every batch."""
  state, rollout, gradient = policy_programs(config, setup, policy)
  programs = {
    name: gradient(setup.scoring._replace(weights={name: 1.0})) for name in setup.scoring.weights
  }
  found, rewards = {name: [] for name in programs}, []
  for step in range(count):
    batch, prompts = step_batch(config, setup, step)
    key = jax.random.fold_in(jax.random.key(1), step)
    samples = rollout(state, setup.frozen, batch, key)
    rewards.append(score(setup, samples, prompts))
    for name, run in programs.items():
      found[name].append(run(state, setup.frozen, batch, samples, rewards[-1], key))
  return {name: np.stack(rows) for name, rows in found.items()}, rewards


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--config", required=True)
  parser.add_argument("--batches", type=int, default=8)
  parser.add_argument("--steps", default="0-2", help="ranges FIRST-LAST, separated by commas")
  options, overrides = parser.parse_known_args()
  config = load_config(options.config, [o.removeprefix("--config.") for o in overrides])
  config.policy.dmd_weight = config.policy.reward_weight = 0.0
  with jax.set_mesh(sharding.make_mesh(**config.mesh)):
    setup = build(config)
    rewards = []
    for steps in options.steps.split(","):
      first, last = map(int, steps.split("-"))
      policy = policy_config(config)._replace(
        range_start=first, range_end=last, num_train_steps=last - first + 1
      )
      found, rewards = gradients(config, setup, policy, options.batches)
      for name, rows in found.items():
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        cosines = [float(a @ b) for a, b in itertools.combinations(unit, 2)]
        error = np.std(cosines) / len(cosines) ** 0.5
        half = options.batches // 2
        one, two = rows[:half].mean(0), rows[half:].mean(0)
        halves = one @ two / (np.linalg.norm(one) * np.linalg.norm(two))
        print(
          f"steps {steps}  {name:12s} cosine {np.mean(cosines):+.4f} ± {error:.4f}"
          f"  of halves {halves:+.4f}",
          flush=True,
        )
  shape = (-1, config.batch.images_per_prompt)
  for one, two in itertools.combinations(sorted(rewards[0]), 2):
    a, b = (np.concatenate([r[name] for r in rewards]).reshape(shape) for name in (one, two))
    a, b = (v - v.mean(1, keepdims=True) for v in (a, b))
    print(
      f"within groups  {one} and {two}: correlation {np.corrcoef(a.ravel(), b.ravel())[0, 1]:.3f}"
    )


if __name__ == "__main__":
  main()
