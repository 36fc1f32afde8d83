"""Typed settings of the training steps, with their defaults."""

from typing import NamedTuple


class Consistency(NamedTuple):
  """The regulariser of the fake score; a weight of 0 leaves it out of the program."""

  weight: float = 0.01
  max_steps_back: int = 200
  transitions: int = 1
  two_sample: bool = True
  stop_transitions: bool = True
  adjacent: bool = False


class DMDConfig(NamedTuple):
  """Distribution matching, for both stages; levels are in timesteps (0 to 1000)."""

  eta: float = 0.9
  guidance_low: float = 4.5
  guidance_high: float = 4.5
  objective: str = "ac_dmd"
  start_mode: str = "next_sigma"
  boundary_index: int = 2
  offset: float = 10.0
  end: float = 1000.0
  min_step: float = 20.0
  max_step: float = 980.0
  inside: bool = False
  normalize: bool = True
  scale_out: bool = True
  weight_low: float = 0.0
  weight_high: float = 10.0
  shift: float = 3.0
  consistency: Consistency = Consistency()


class PolicyConfig(NamedTuple):
  """SubGRPO, the last-step terms and how a batch is cut for memory."""

  num_train_steps: int = 2
  range_start: int = 0
  range_end: int = 2
  clip_low: float = 1e-5
  clip_high: float = 1e-5
  advantage_limit: float = 5.0
  kl_weight: float = 0.0
  subset_factor: bool = False
  gaussian_log_prob: bool = False
  per_prompt: bool = True
  global_std: bool = True
  weight_advantages: bool = True
  policy_weight: float = 1.0
  dmd_weight: float = 1e-3
  reward_weight: float = 1e-4
  reward_margin: float = 3.0
  micro_batches: int = 1
  decode_parts: int = 1  # of a micro-batch


class OptimizerConfig(NamedTuple):
  """AdamW with global-norm clipping and linear warm-up to a constant rate."""

  learning_rate: float
  warmup_steps: int = 0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 1.0
