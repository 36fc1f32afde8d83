"""Stacks of identical blocks: scanned for short compilation, rematerialised for memory."""

import functools

import flax.linen as nn
import jax

from rtdmd_jax.models.layers import ADAPTER_COLLECTIONS
from rtdmd_jax.runtime.sharding import to_device

# What the backward pass may keep of a block: everything, nothing, or results of weight products.
REMAT_POLICIES = {
  "none": jax.checkpoint_policies.everything_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def remat_block(block: type[nn.Module], remat: str, *, prevent_cse: bool = True):
  """Applies a rematerialisation policy to a block's class, which fetches its own parameters.

  Parameters kept in the host's memory reach the device one block at a time, and with a policy
  other than "none" the backward pass fetches them again.

  Args:
    block: module class.
    remat: a name in `REMAT_POLICIES`.
    prevent_cse: may be False inside a loop, where XLA cannot merge the recomputation away.
  """
  block = _fetching(block)
  if remat == "none":
    return block
  return nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=prevent_cse)


def _fetching(block: type[nn.Module]) -> type[nn.Module]:
  """A block that copies its parameters to the device when its input is there.

  A copy that depended on parameters alone would be invariant in a loop around the network. In the
  gradient of such a loop jax takes what is invariant out of it, and all kernels of the stack would
  lie on the device during the loop.
  """

  class Fetching(block):  # type: ignore[misc, valid-type]
    def __call__(self, carry, *shared):
      fetch = functools.partial(to_device, after=carry)
      call = nn.map_variables(block.__call__, "params", trans_in_fn=fetch, init=True)
      return call(self, carry, *shared)

  return Fetching


def stack_blocks(block: type[nn.Module], length: int, *, scan: bool, remat: str):
  """Turns a block's class into one that applies `length` blocks in turn.

  The block maps (carry, *shared) to (carry, None). Parameters and adapters have a leading axis of
  `length`, whether the loop stays a loop (`scan`) or is unrolled in the compiled program.
  """
  return nn.scan(
    remat_block(block, remat, prevent_cse=not scan),
    variable_axes=dict.fromkeys(("params", *ADAPTER_COLLECTIONS), 0),
    split_rngs={"params": True},
    in_axes=nn.broadcast,
    length=length,
    unroll=1 if scan else length,
  )
