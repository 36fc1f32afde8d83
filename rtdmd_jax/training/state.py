"""The inputs and outputs of a training step."""

from typing import Any, NamedTuple

import flax.struct
import jax

from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.pipeline.velocity import ApplyFn

Tree = Any
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
  """Everything that training changes; a checkpoint holds exactly this.

  `generator` and `fake_score` are the adapters being trained, `ema` the moving average of the
  generator's, always float32. Randomness is a function of the seed and `step`, so no key needs to
  be stored.
  """

  step: jax.Array
  generator: Tree
  fake_score: Tree
  ema: Tree
  generator_opt: Tree
  fake_score_opt: Tree

  def trained(self, network: str) -> tuple[Tree, Tree]:
    """Adapters and optimizer state of "generator" or "fake_score"."""
    return getattr(self, network), getattr(self, f"{network}_opt")

  def with_trained(self, network: str, adapters: Tree, opt_state: Tree) -> "TrainState":
    """The state with other adapters and another optimizer state of one network."""
    return self.replace(**{network: adapters, f"{network}_opt": opt_state})


@flax.struct.dataclass
class Frozen:
  """The arrays that training reads and never changes.

  `bases` maps a base's key to its parameters, so that roles that share a base share the arrays;
  `generator` and `fake_score` are earlier stages' adapters with their scale folded in (or empty).
  `rewards` holds the parameters of the rewards on the device, `vae` those of the decoder.
  """

  bases: dict[str, Tree]
  generator: Tree
  fake_score: Tree
  vae: Tree
  rewards: dict[str, Tree]


@flax.struct.dataclass
class Batch:
  """Encoded prompts and the global indices of the samples.

  `conditioning` holds each distinct prompt once; `prompt_index` [N] says which one a sample uses;
  `sample_index` [N] makes every sample's noise independent of where it is computed. `reward_text`
  has the distinct prompts' features for each reward on the device.
  """

  conditioning: Conditioning
  prompt_index: jax.Array
  sample_index: jax.Array
  unconditional: Conditioning | None
  reward_text: dict[str, jax.Array] = flax.struct.field(default_factory=dict)


class Roles(NamedTuple):
  """The description of the three roles: the backbone, its bases and the schedule.

  Attributes:
    apply: the backbone's function of variables, latents, sigma, tokens, pooled and guidance.
    generator: the key of its base in `Frozen.bases`.
    fake_score: likewise.
    teacher: likewise.
    lora_alpha: alpha of the adapters in training, whose `b` is multiplied by alpha / rank.
    sigmas: [K + 1] the few-step schedule with the final 0.
    latent_shape: (h, w, c) of one sample.
    embedded_guidance: whether the guidance scale is an input of the backbone.
  """

  apply: ApplyFn
  generator: str
  fake_score: str
  teacher: str
  lora_alpha: float
  sigmas: jax.Array
  latent_shape: tuple[int, int, int]
  embedded_guidance: bool = False
