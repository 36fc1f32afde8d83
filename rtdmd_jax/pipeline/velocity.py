"""The three roles over shared bases: teacher psi, generator theta, fake score phi.

A role is a base plus an optional frozen adapter plus an optional adapter in training; its velocity
is a callable `(x [B, H, W, C], sigma [B]) -> v` with conditioning and guidance inside.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.runtime.sharding import constrain

Tree = Any
Velocity = Callable[[jax.Array, jax.Array], jax.Array]
# (variables, x, sigma, tokens, pooled, guidance) -> v, of the backbone.
ApplyFn = Callable[..., jax.Array]


def role_variables(base: Tree, frozen_adapters: Tree = None, adapters: Tree = None) -> dict:
  """The Flax variables of a role; an absent adapter costs nothing."""
  variables = {"params": base}
  if frozen_adapters:
    variables["lora_frozen"] = frozen_adapters
  if adapters:
    variables["lora"] = adapters
  return variables


def role_velocity(
  apply: ApplyFn,
  variables: dict,
  conditioning: Conditioning,
  *,
  unconditional: Conditioning | None = None,
  guidance: float | jax.Array = 1.0,
  embedded_guidance: bool = False,
) -> Velocity:
  """The velocity field of a role.

  Args:
    apply: the backbone's function of (variables, x, sigma, tokens, pooled, guidance).
    variables: from `role_variables`.
    conditioning: of the batch.
    unconditional: encodings of the empty prompt [1, ...]; needed for classifier-free guidance.
    guidance: the scale; without `unconditional` the conditional velocity alone is returned.
    embedded_guidance: the backbone takes the scale as an input instead (FLUX.1-dev).
  """

  def conditional(x: jax.Array, sigma: jax.Array) -> jax.Array:
    batch = x.shape[0]
    scale = jnp.full((batch,), guidance, jnp.float32) if embedded_guidance else None
    sigma = jnp.broadcast_to(sigma, (batch,))
    x, tokens, pooled = jax.tree.map(constrain, (x, conditioning.tokens, conditioning.pooled))
    return apply(variables, x, sigma, tokens, pooled, scale)

  def guided(x: jax.Array, sigma: jax.Array) -> jax.Array:
    # One call for both halves: the weights are read once.
    batch = x.shape[0]
    both = jax.tree.map(
      lambda c, u: jnp.concatenate([c, jnp.broadcast_to(u, c.shape)]), conditioning, unconditional
    )
    sigma = jnp.tile(jnp.broadcast_to(sigma, (batch,)), 2)
    x, both = jax.tree.map(constrain, (jnp.concatenate([x, x]), both))
    v = apply(variables, x, sigma, both.tokens, both.pooled, None)
    v_cond, v_uncond = jnp.split(v.astype(jnp.float32), 2)
    return v_uncond + guidance * (v_cond - v_uncond)

  return conditional if unconditional is None or embedded_guidance else guided
