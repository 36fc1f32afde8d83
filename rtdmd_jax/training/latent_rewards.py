"""Rewards on the device: from clean latents through the decoder to scores, and back."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rtdmd_jax.training.state import Frozen

Tree = Any


class LatentRewards(NamedTuple):
  """Rewards that live on the device, and the decoder that feeds them.

  `decode` maps (vae params, latents [B, h, w, c]) to images [B, H, W, 3] in [0, 1]; a device reward
  maps (its params, images, its features of the prompts [B, ...]) to [B]. `weights` covers every
  reward that trains, `differentiable` those that are also back-propagated. `gradient` has their
  functions where those are not the ones of `device`, of the same arguments.
  """

  decode: Callable[[Tree, jax.Array], jax.Array]
  device: dict[str, Callable[[Tree, jax.Array, jax.Array], jax.Array]]
  weights: dict[str, float]
  differentiable: tuple[str, ...]
  gradient: Mapping[str, Callable[[Tree, jax.Array, jax.Array], jax.Array]] = MappingProxyType({})


class ScoredLatents(NamedTuple):
  """Images and scores of decoded clean latents; the last two only with back-propagated rewards."""

  rewards: dict[str, jax.Array]  # [n] each
  images: jax.Array  # [n, H, W, 3] in [0, 1]
  weighted_reward: jax.Array | None  # [n], weighted sum of the back-propagated rewards
  reward_grad: jax.Array | None  # [n, h, w, c], its gradient with respect to the latents


def score_latents(
  latents: jax.Array,
  text: dict[str, jax.Array],
  frozen: Frozen,
  scoring: LatentRewards,
  backward: tuple[str, ...],
) -> ScoredLatents:
  """Decodes clean latents once, scores them, and back-propagates the scores.

  Args:
    latents: [n, h, w, c].
    text: [n, ...] features of each image's prompt for every reward.
    frozen: decoder and rewards.
    scoring: how to compute them.
    backward: which rewards are back-propagated.
  """

  def score(functions: Mapping[str, Callable], name: str, images: jax.Array) -> jax.Array:
    return functions[name](frozen.rewards[name], images, text[name])

  def summed(latents: jax.Array) -> tuple[jax.Array, tuple]:
    images = scoring.decode(frozen.vae, latents)
    functions = {**scoring.device, **scoring.gradient}
    scores = {name: score(functions, name, images) for name in backward}
    weighted = [scoring.weights[name] * scores[name] for name in backward]
    return sum(weighted, jnp.zeros(len(latents))), (images, scores)

  if backward:
    weighted_reward, pull_back, (images, scores) = jax.vjp(summed, latents, has_aux=True)
    (reward_grad,) = pull_back(jnp.ones_like(weighted_reward))
  else:
    weighted_reward = reward_grad = None
    images, scores = summed(latents)[1]
  known = scores.keys() - scoring.gradient.keys()
  rewards = {
    name: scores[name] if name in known else score(scoring.device, name, images)
    for name in scoring.device
  }
  return ScoredLatents(rewards, images, weighted_reward, reward_grad)
