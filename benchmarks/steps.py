"""Both stages' updates against the same updates in PyTorch, on this machine's CPU.

taskset -c 0 python -m benchmarks.steps --rounds=7 --compile

Float32, one small SD3, the same weights and random numbers; as many threads as the process may use
cores (`taskset`). Rounds take turns, so that a busy machine hurts all alike; time is the processor
time of the process (wall time beside it), of which the median counts. MFU is of our matrix
products, without those that are recomputed, against one large product. Needs the `parity` extra;
`--compile` adds torch.compile and needs a C++ compiler. `policy` is stage 2's without
back-propagated rewards; its fake-score update is stage 1's.
"""

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import record, tables
from benchmarks import torch_peer as peer
from rtdmd_jax.adapters.peft import load_peft
from rtdmd_jax.algo import timesteps
from rtdmd_jax.algo.advantages import group_advantages
from rtdmd_jax.algo.subgrpo import sample_noise
from rtdmd_jax.models import build_transformer
from rtdmd_jax.pipeline.conditioning import Conditioning
from rtdmd_jax.runtime.flops import count_flops
from rtdmd_jax.training.latent_rewards import LatentRewards
from rtdmd_jax.training.objectives import AmbientDMD
from rtdmd_jax.training.optim import Optimizers, make_optimizer
from rtdmd_jax.training.settings import DMDConfig, OptimizerConfig, PolicyConfig
from rtdmd_jax.training.stage1 import Stage1
from rtdmd_jax.training.stage2 import RolloutBatch, Stage2
from rtdmd_jax.training.state import Batch, Frozen, Roles, TrainState
from rtdmd_jax.weights.safetensors import load_params, read_config

SIZES = dict(
  sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=6,
  attention_head_dim=64, num_attention_heads=4, joint_attention_dim=256,
  caption_projection_dim=256, pooled_projection_dim=256, pos_embed_max_size=16,
  qk_norm="rms_norm",
)  # fmt: skip
SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)
STOP = 3
BATCH, TEXT_LENGTH = 4, 77
LEARNING_RATE, GUIDANCE = 3e-5, 4.5
# Two prompts of two samples each, the first two of four steps.
POLICY = PolicyConfig(num_train_steps=2, dmd_weight=0.1, reward_weight=0.0)
CHOSEN = [0, 1]
TRAINED = {"fake_score": "fake_score", "generator": "generator", "policy": "generator"}
UPDATES = tuple(TRAINED)


class Case(NamedTuple):
  """The same networks, inputs and draws in both programs, by update where they differ."""

  ours: dict[str, Callable[[], dict[str, Any]]]
  theirs: dict[str, Callable[[], dict[str, Any]]]
  flops: dict[str, float]


class Epoch(NamedTuple):
  """What stage 2 sampled: x [K + 1, B, h, w, c], the prompt of each sample, a reward [B]."""

  x: np.ndarray
  prompt: np.ndarray
  reward: np.ndarray


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--compile", action="store_true", help="time torch.compile as well")
  record.add_flag(parser)
  options = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_disable_most_optimizations", False)
  threads = len(os.sched_getaffinity(0))
  torch.set_num_threads(threads)
  case = make_case(SIZES, BATCH, TEXT_LENGTH)
  programs = {"rtdmd_jax": case.ours, "PyTorch, eager": case.theirs}
  if options.compile:
    compiled = make_case(SIZES, BATCH, TEXT_LENGTH, wrap=torch.compile)
    programs["PyTorch, torch.compile"] = compiled.theirs
  rates = product_rates()
  ceiling = max(rates.values())
  products = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.items())
  print(f"jax {jax.__version__}, torch {torch.__version__}, threads: {threads}")
  print(f"load of the last minute {os.getloadavg()[0]:.1f}, large product in GFLOP/s: {products}")
  rows = []
  for name in UPDATES:
    runs = {key: runs[name] for key, runs in programs.items()}
    rows += compare(name, runs, case.flops[name], ceiling, options.rounds)
  tables.report("steps", rows, options.save)


def compare(name: str, programs: dict, flops: float, ceiling: float, rounds: int) -> list[dict]:
  """A row for each program of one update."""
  losses = {key: run()["loss"] for key, run in programs.items()}  # compiles, too
  spent = {key: [] for key in programs}
  for _ in range(rounds):
    for key, run in programs.items():
      spent[key].append(timed(run))
  medians = {key: [statistics.median(c) for c in zip(*t, strict=True)] for key, t in spent.items()}
  first = next(iter(medians.values()))[0]
  return [
    {
      "update": name, "program": key, "gflop": flops / 1e9, "cpu_seconds": cpu,
      "wall_seconds": wall, "times_ours": cpu / first, "mfu": flops / cpu / ceiling,
      "loss": losses[key],
    }
    for key, (cpu, wall) in medians.items()
  ]  # fmt: skip


def timed(run: Callable[[], Any]) -> tuple[float, float]:
  """Processor and wall seconds."""
  cpu, wall = time.process_time(), time.perf_counter()
  run()
  return time.process_time() - cpu, time.perf_counter() - wall


def matmul_ceiling() -> float:
  """Best float32 rate of one matrix product (1/s), of the faster library."""
  return max(product_rates().values())


def product_rates(side: int = 1024, rounds: int = 9) -> dict[str, float]:
  """Best float32 rate of one matrix product (1/s) of each library, by processor time."""
  a, b = jnp.ones((side, side)), torch.ones(side, side)
  product = jax.jit(jnp.matmul)
  runs = {"jax": lambda: product(a, a).block_until_ready(), "torch": lambda: b @ b}
  rates = {}
  for name, run in runs.items():
    run()
    rates[name] = 2.0 * side**3 / min(timed(run)[0] for _ in range(rounds))
  return rates


def make_case(
  sizes: dict[str, Any], batch: int, length: int, wrap: Callable[[Any], Any] = lambda model: model
) -> Case:
  """Builds both programs; `wrap` is applied to PyTorch's networks."""
  models = peer.make_models(sizes)
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
  wide, narrow = sizes["joint_attention_dim"], sizes["pooled_projection_dim"]
  texts, empty = ((draw(n, length, wide), draw(n, narrow)) for n in (batch, 1))
  side = sizes["sample_size"]
  latents = (side, side, sizes["in_channels"])
  epoch = Epoch(draw(len(SIGMAS), batch, *latents), np.arange(batch) // 2, draw(batch))
  seeds = {name: 0 if name == "policy" else seed_with_stop(name) for name in UPDATES}
  with tempfile.TemporaryDirectory() as directory:
    ours, flops = our_updates(models, Path(directory), texts, empty, latents, seeds, epoch)
  draws = {name: peer_draws(name, jax.random.key(seeds[name]), batch, latents) for name in UPDATES}
  theirs = {
    name: their_update(name, models, wrap, texts, empty, draws[name], epoch) for name in UPDATES
  }
  return Case(ours, theirs, flops)


def keys(name: str, key: Any) -> tuple[Any, Any]:
  """The keys of an update's rollout and of its loss."""
  parts = jax.random.split(key, 3 if name == "fake_score" else 4)
  return parts[0], parts[2]


def seed_with_stop(name: str) -> int:
  """The first seed whose rollout takes `STOP` steps."""
  for seed in range(1000):
    rollout_key, _ = keys(name, jax.random.key(seed))
    if int(timesteps.random_stop(jax.random.split(rollout_key, 3)[2], len(SIGMAS) - 1)) == STOP:
      return seed
  raise ValueError(f"no seed below 1000 stops after {STOP} steps")


def peer_draws(name: str, key: Any, batch: int, latents: tuple[int, int, int]) -> Any:
  """What an update of ours draws from `key`, for the peer."""
  index, config = jnp.arange(batch), DMDConfig()
  objective = AmbientDMD(config, jnp.array(SIGMAS))
  column = lambda a: torch.tensor(np.array(a)).reshape(-1, 1, 1, 1)  # noqa: E731

  def noise(key, shape=latents):
    drawn = torch.tensor(np.array(sample_noise(key, index, shape)))
    return drawn.movedim(-1, -3).contiguous()

  if name == "policy":
    _, noise_key = jax.random.split(jax.random.split(key)[0])
    parts = jax.random.split(noise_key, 3)
    level = objective.renoise_sigma(jnp.float32(0), index, parts[0])
    return peer.Draws(None, [], column(level), noise(parts[1]), None, [noise(parts[2])])
  rollout_key, loss_key = keys(name, key)
  start_key, step_key, _ = jax.random.split(rollout_key, 3)
  steps = [noise(jax.random.fold_in(step_key, i)) for i in range(STOP)]
  parts = jax.random.split(loss_key, 4 if name == "fake_score" else 3)
  level = objective.renoise_sigma(jnp.float32(SIGMAS[STOP]), index, parts[0])
  if name == "generator":
    back, moves = None, [noise(parts[2])]
  else:
    c = config.consistency
    back = column(timesteps.consistency_steps(parts[2], 1, index, epsilon=c.max_steps_back))
    moves = list(noise(parts[3], (2, 1, *latents))[:, :, 0].movedim(1, 0))
  return peer.Draws(noise(start_key), steps, column(level), noise(parts[1]), back, moves)


def our_updates(models, directory: Path, texts, empty, latents, seeds, epoch):
  """Callables that run each update and return its loss and gradient norm, and their FLOP."""
  for role in ("base", "teacher"):
    models[role].save_pretrained(directory / role)
  # Recomputing what is no weight's product costs less here than storing it, as in the tiny configs.
  transformer = build_transformer(read_config(directory / "base"), remat="dots")
  plain = build_transformer(read_config(directory / "base"))
  shapes = transformer.init_abstract()
  bases = {
    role: load_params(directory / role, shapes, transformer.table, dtype=np.float32)
    for role in ("base", "teacher")
  }
  adapters = {}
  for role in ("generator", "fake_score"):
    models[role].save_lora_adapter(str(directory / role), adapter_name="trained")
    adapters[role], _ = load_peft(directory / role, bases["base"], transformer.table)
  optimizer = make_optimizer(OptimizerConfig(LEARNING_RATE, clip_norm=peer.CLIP_NORM))
  state = TrainState(
    jnp.zeros((), jnp.int32), adapters["generator"], adapters["fake_score"],
    adapters["generator"], *(optimizer.init(adapters[r]) for r in ("generator", "fake_score")),
  )  # fmt: skip
  frozen = Frozen(bases, {}, {}, {}, {})
  count = jnp.arange(len(texts[0]))
  conditioning, unconditional = (Conditioning(*map(jnp.asarray, t)) for t in (texts, empty))
  batch = Batch(conditioning, count, count, unconditional)
  roles = Roles(
    transformer.apply, "base", "base", "teacher", peer.ALPHA,
    jnp.array(SIGMAS), latents,
  )  # fmt: skip
  config = DMDConfig(eta=peer.ETA, guidance_low=GUIDANCE, guidance_high=GUIDANCE)
  scoring = LatentRewards(lambda params, x: x, {}, {"reward": 1.0}, ())
  optimizers = Optimizers(optimizer, optimizer)

  def update(name: str, roles: Roles) -> Callable:
    if name == "policy":
      return Stage2(roles, config, POLICY, scoring, optimizers).policy_step
    return getattr(Stage1(roles, config, optimizers), f"{name}_step")

  zeros = jnp.zeros((len(SIGMAS) - 1, len(count)))  # log-probabilities are only compared with
  samples = RolloutBatch(jnp.asarray(epoch.x), zeros, jnp.array(CHOSEN), {}, jnp.zeros(0))
  groups = batch.replace(prompt_index=jnp.asarray(epoch.prompt))
  more = {"policy": (samples, {"reward": jnp.asarray(epoch.reward)})}
  runs, flops = {}, {}
  for name in ("fake_score", "generator", "policy"):
    program = jax.jit(update(name, roles))
    given = (groups, *more[name]) if name in more else (batch,)
    args = (state, frozen, *given, jax.random.key(seeds[name]))
    counted = update(name, roles._replace(apply=plain.apply))
    flops[name] = count_flops(jax.jit(counted).trace(*args).jaxpr, STOP - (name == "generator"))
    runs[name] = partial(run_ours, name, program, args)
  return runs, flops


def run_ours(name: str, program: Callable, args: tuple) -> dict[str, float]:
  """One update from the same state."""
  _, metrics = jax.block_until_ready(program(*args))
  found = {key.removeprefix("loss/"): float(v) for key, v in metrics.items() if "loss/" in key}
  return found | {"loss": found[name], "grad_norm": float(metrics[f"{TRAINED[name]}/grad_norm"])}


def their_update(name, models, wrap, texts, empty, draws, epoch) -> Callable[[], dict[str, Any]]:
  """A callable that runs an update with PyTorch; its parameters move from call to call."""
  # Copies, so that the other update does not see them move.
  roles = {role: wrap(copy.deepcopy(model)) for role, model in models.items() if role != "base"}
  texts, empty = (peer.Texts(*map(torch.as_tensor, pair)) for pair in (texts, empty))
  if name == "policy":
    texts = peer.Texts(*(a[epoch.prompt] for a in texts))
  optimizer = peer.make_optimizer(roles[TRAINED[name]], LEARNING_RATE)
  generator, fake = (peer.velocity(roles[role], texts) for role in ("generator", "fake_score"))
  teacher = peer.velocity(roles["teacher"], texts, empty, GUIDANCE)

  def fake_score() -> dict[str, Any]:
    parts = peer.fake_score_loss(generator, fake, SIGMAS, STOP, draws)
    total = parts["fake_score"] + peer.CONSISTENCY_WEIGHT * parts["consistency"]
    norm = peer.update(total, optimizer)
    found = {key: value.item() for key, value in parts.items()}
    return found | {"loss": found["fake_score"], "grad_norm": norm}

  def generate() -> dict[str, Any]:
    loss = peer.generator_loss(generator, fake, teacher, SIGMAS, STOP, draws)
    norm = peer.update(loss, optimizer)
    return {"generator": loss.item(), "loss": loss.item(), "grad_norm": norm}

  x = torch.tensor(epoch.x).movedim(-1, -3).contiguous()
  rewards, prompt = {"reward": jnp.asarray(epoch.reward)}, jnp.asarray(epoch.prompt)
  advantages = torch.tensor(np.array(group_advantages(rewards, prompt, {"reward": 1.0})))
  each = peer.Texts(*(torch.cat([a] * (len(CHOSEN) + 1)) for a in texts))

  def policy() -> dict[str, Any]:
    parts = peer.policy_loss(
      peer.velocity(roles["generator"], each), fake, teacher, SIGMAS, x, CHOSEN, advantages,
      POLICY.clip_low, draws,
    )  # fmt: skip
    total = len(CHOSEN) * parts["policy"] + POLICY.dmd_weight * parts["generator"]
    norm = peer.update(total / (len(CHOSEN) + 1), optimizer)
    found = {key: value.item() for key, value in parts.items()}
    return found | {"loss": found["policy"], "grad_norm": norm}

  return {"fake_score": fake_score, "generator": generate, "policy": policy}[name]


if __name__ == "__main__":
  main()
