"""Variance of the policy gradient on images: SubGRPO beside naive GRPO, at equal samples.

python -m benchmarks.policy_variance --config=configs/tiny_stage2.py --batches=24

Each row is a policy: M of the three stochastic steps train, and the noise of the others is shared
within a prompt's group or not. Every batch has its own prompts and noise; all policies see the same
batches. A gradient is a mean over the trained steps, which estimates the mean over all stochastic
ones whatever M is; its variance is summed over parameters and printed over that of GRPO (all three
steps). Rewards are not divided by the deviation of the batch, which sharing changes.
"""

import argparse
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import record, tables
from rtdmd_jax.config import load_config
from rtdmd_jax.runtime import sharding
from rtdmd_jax.training.optim import Optimizers
from rtdmd_jax.training.setup import Setup, build
from rtdmd_jax.training.stage2 import Stage2
from rtdmd_jax.training.stages import initial_state, step_batch
from rtdmd_jax.training.typed_config import dmd_config, policy_config

# M and whether the steps that do not train share their noise; the first is the reference.
POLICIES = ((3, False), (2, False), (2, True), (1, False), (1, True))


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


def alone(batch):
  """The batch with every sample as a prompt of its own: nothing to share noise with."""
  rows = batch.prompt_index
  return batch.replace(
    conditioning=batch.conditioning.take(rows),
    prompt_index=jnp.arange(rows.shape[0]),
    reward_text=jax.tree.map(lambda a: a[rows], batch.reward_text),
  )


def gradients(config, setup, policy, shared: bool, count: int):
  """Policy gradients [count, P], and the rewards' mean deviation within groups."""
  state, rollout, gradient = policy_programs(config, setup, policy)
  gradient = gradient(setup.scoring)
  terms = (policy.num_train_steps + 1) / policy.num_train_steps
  found, spreads = [], []
  for step in range(count):
    batch, prompts = step_batch(config, setup, step)
    key = jax.random.fold_in(jax.random.key(1), step)
    samples = rollout(state, setup.frozen, batch if shared else alone(batch), key)
    rewards = score(setup, samples, prompts)
    total = sum(w * rewards[name] for name, w in setup.scoring.weights.items())
    unit = gradient(state, setup.frozen, batch, samples, rewards, key)
    # The step divides by the batch's deviation (and adds 1e-4), and averages over the trained steps
    # and the last one: both undone.
    found.append(np.asarray(unit, np.float64) * (total.std() + 1e-4) * terms)
    spreads.append(total.reshape(-1, config.batch.images_per_prompt).std(1).mean())
  return np.stack(found), float(np.mean(spreads))


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--config", required=True)
  parser.add_argument("--batches", type=int, default=24)
  record.add_flag(parser)
  options, overrides = parser.parse_known_args()
  config = load_config(options.config, [o.removeprefix("--config.") for o in overrides])
  config.policy.dmd_weight = config.policy.reward_weight = 0.0
  # One advantage of the weighted reward, centred by group; no second normalisation, no clamp.
  config.policy.weight_advantages = False
  config.policy.advantage_limit = 1e6
  with jax.set_mesh(sharding.make_mesh(**config.mesh)):
    setup = build(config)
    reference, table = None, []
    for trained, shared in POLICIES:
      policy = policy_config(config)._replace(num_train_steps=trained, range_start=0, range_end=2)
      rows, spread = gradients(config, setup, policy, shared, options.batches)
      # Per batch, so that the ratio's error can be told: the mean itself is nearly nothing.
      squares = np.square(rows - rows.mean(0)).sum(1) * len(rows) / (len(rows) - 1)
      reference = squares if reference is None else reference
      ratio = float(squares.mean() / reference.mean())
      error = np.std(squares / squares.mean() - reference / reference.mean(), ddof=1)
      error = float(error * ratio / len(rows) ** 0.5)
      noise = "none left" if trained == 3 else "shared" if shared else "independent"
      row = {"trained": trained, "noise": noise, "deviation": spread}
      table.append(row | {"variance": ratio, "variance_error": error})
    tables.report("policy_variance", table, options.save)


if __name__ == "__main__":
  main()
