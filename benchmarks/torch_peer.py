"""Updates of AC-DMD and RTDMD (arXiv 2605.26108, section 3) in PyTorch, to time ours against.

Of diffusers' SD3 transformer and PEFT's adapters; latents are channel-first here. The random
numbers come from outside, so that both programs compute the same step.
"""

import copy
import math
from typing import Any, NamedTuple

import diffusers
import peft
import torch

ETA = 0.9
CONSISTENCY_WEIGHT = 0.01
RANK, ALPHA = 32, 64.0
CLIP_NORM = 1.0
TARGETS = [
  "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
  "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
]  # fmt: skip


class Draws(NamedTuple):
  """What one update draws; levels [B, 1, 1, 1], noise [B, C, H, W]."""

  start: torch.Tensor
  steps: list[torch.Tensor]
  level: torch.Tensor
  renoise: torch.Tensor
  back: torch.Tensor | None  # size of the consistency term's move
  moves: list[torch.Tensor]  # noise of each move back


class Texts(NamedTuple):
  """Encodings: tokens [B, L, D] and pooled [B, P]."""

  tokens: torch.Tensor
  pooled: torch.Tensor


def make_models(sizes: dict[str, Any], seed: int = 0) -> dict[str, torch.nn.Module]:
  """Random networks: a base, generator and fake score with adapters on it, and another teacher."""
  torch.manual_seed(seed)
  base = diffusers.SD3Transformer2DModel(**sizes).requires_grad_(False)
  teacher = copy.deepcopy(base)
  for parameter in teacher.parameters():
    parameter.add_(0.01 * torch.randn_like(parameter))
  models = {"base": base, "teacher": teacher}
  for role in ("generator", "fake_score"):
    models[role] = copy.deepcopy(base)
    config = peft.LoraConfig(
      r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False
    )
    models[role].add_adapter(config, adapter_name="trained")
  return models


def make_optimizer(model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
  """AdamW over what is trained."""
  trained = [p for p in model.parameters() if p.requires_grad]
  return torch.optim.AdamW(trained, learning_rate, (0.9, 0.999), 1e-8, weight_decay=0.0)


def velocity(model, texts: Texts, unconditional: Texts | None = None, guidance: float = 1.0):
  """`(x, sigma) -> v`, guided if there is an unconditional encoding [1, ...]."""

  def run(x, sigma, texts):
    timestep = 1000.0 * torch.as_tensor(sigma, dtype=torch.float32).reshape(-1).expand(len(x))
    return model(x, texts.tokens, texts.pooled, timestep, return_dict=False)[0]

  def guided(x, sigma):
    # Both halves in one call, as ours.
    both = Texts(
      *(torch.cat([c, u.expand_as(c)]) for c, u in zip(texts, unconditional, strict=True))
    )
    conditional, plain = run(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
    return plain + guidance * (conditional - plain)

  return guided if unconditional else lambda x, sigma: run(x, sigma, texts)


def transition(x, v, sigma, next_sigma, noise):
  """One coefficient-preserving move."""
  clean, eps = x - sigma * v, x + (1 - sigma) * v
  angle = ETA * math.pi / 2
  return (1 - next_sigma) * clean + next_sigma * (math.cos(angle) * eps + math.sin(angle) * noise)


def rollout(generator, sigmas: list[float], stop: int, draws: Draws):
  """The sample after `stop` steps, of which the last may carry a gradient."""
  x = draws.start
  with torch.no_grad():
    for i in range(stop - 1):
      x = transition(x, generator(x, sigmas[i]), sigmas[i], sigmas[i + 1], draws.steps[i])
  i = stop - 1
  return transition(x, generator(x, sigmas[i]), sigmas[i], sigmas[i + 1], draws.steps[i])


def renoise(x_s, s: float, draws: Draws):
  """The sample carried from level s up to the drawn level, and the standard deviation added."""
  keep = (1 - draws.level) / (1 - s)
  added = (draws.level**2 - (keep * s) ** 2).sqrt()
  return keep * x_s + added * draws.renoise, added


def fake_score_loss(generator, fake, sigmas, stop: int, draws: Draws) -> dict[str, torch.Tensor]:
  """The parts `fake_score` and `consistency`, unweighted."""
  s, t = sigmas[stop], draws.level
  with torch.no_grad():
    x_s = rollout(generator, sigmas, stop, draws)
  x_t, added = renoise(x_s, s, draws)
  target = -added / (1 - s) * x_s + (t + (1 - t) * (s / (1 - s)) ** 2) * draws.renoise
  v = fake(x_t, t)
  weight = (1 / added**2).clamp(0.0, 10.0)
  score = (weight * (added * v - target) ** 2).mean()
  lower = (t - draws.back).clamp(min=0.0)
  anchor, ends = x_t - t * v, []
  for noise in draws.moves:
    x = transition(x_t, v.detach(), t, lower, noise)
    ends.append(x - lower * fake(x, lower))
  return {"fake_score": score, "consistency": ((ends[0] - anchor) * (ends[1] - anchor)).mean()}


def generator_loss(generator, fake, teacher, sigmas, stop: int, draws: Draws) -> torch.Tensor:
  """Distribution matching on the sub-interval."""
  s = sigmas[stop]
  return matching_loss(rollout(generator, sigmas, stop, draws), s, fake, teacher, draws)


def matching_loss(x_s, s: float, fake, teacher, draws: Draws) -> torch.Tensor:
  """Pulls `x_s` of level s to where the teacher and not the fake score moves it."""
  with torch.no_grad():
    x_t, _ = renoise(x_s, s, draws)
    wrong, real = (
      transition(x_t, role(x_t, draws.level), draws.level, s, draws.moves[0])
      for role in (fake, teacher)
    )
    away = (wrong - real) / (x_s - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    aim = x_s - away
  return 0.5 * (x_s - aim).square().mean()


def policy_loss(
  generator, fake, teacher, sigmas, x, chosen: list[int], advantages, clip: float, draws: Draws
) -> dict[str, torch.Tensor]:
  """The parts `policy` (mean over the chosen steps) and `generator` (of the last step), unweighted.

  `x` [K + 1, B, C, H, W] are the rollout's samples; all steps go through the generator in one call.
  """
  steps = [*chosen, len(sigmas) - 2]
  levels = torch.tensor([sigmas[i] for i in steps]).repeat_interleave(x.shape[1])
  *v, v_last = generator(torch.cat([x[i] for i in steps]), levels).chunk(len(steps))
  losses = []
  for i, v_i in zip(chosen, v, strict=True):
    mean = transition(x[i], v_i, sigmas[i], sigmas[i + 1], 0.0)
    log_prob = -(x[i + 1] - mean).square().mean(dim=(1, 2, 3))
    ratio = (log_prob - log_prob.detach()).exp()
    bounded = ratio.clamp(1 - clip, 1 + clip)
    losses.append(torch.maximum(-advantages * ratio, -advantages * bounded).mean())
  clean = x[-2] - sigmas[-2] * v_last
  matching = matching_loss(clean, 0.0, fake, teacher, draws)
  return {"policy": torch.stack(losses).mean(), "generator": matching}


def update(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
  """One clipped optimizer step; returns the gradient's norm before clipping."""
  optimizer.zero_grad(set_to_none=True)
  loss.backward()
  trained = [p for group in optimizer.param_groups for p in group["params"]]
  norm = torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
  optimizer.step()
  return float(norm)
