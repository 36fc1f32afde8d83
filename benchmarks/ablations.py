"""The paper's ablations on the shipped tiny pipeline, and ours of its deviations.

python -m benchmarks.ablations                      # all that the results lack; hours
python -m benchmarks.ablations --only=stage1 --seeds 0
python -m benchmarks.ablations --table              # prints what there is

A run is short (see `STAGES`): differences between its variants are what counts, not its scores. All
start from the same weights; every trained generator draws `IMAGES` images for each held-out
prompt. Results are kept after every run, and a run that is there is not run again.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record, tables
from benchmarks.columns import TABLES
from rtdmd_jax.config import load_config
from rtdmd_jax.evaluate import systems
from rtdmd_jax.evaluate.evaluator import Evaluator
from rtdmd_jax.runtime import sharding
from rtdmd_jax.training.setup import build
from rtdmd_jax.training.stages import initial_state, make_step, step_batch

ROOT = Path(__file__).parents[1]
IMAGES = 4
_TEACHER: list[np.ndarray] = []  # features of its images, drawn once a process

# What all variants of a stage have: the config and overrides.
STAGES = {
  "stage1": ("configs/tiny_stage1.py", ("train.steps=150", "ema.decay=0.9")),
  "stage2": ("configs/tiny_stage2.py", ("train.steps=20", "ema.decay=0.95")),
}
_POLICY_ALONE = ("policy.dmd_weight=0.0", "policy.reward_weight=0.0")
_ALL_STEPS = ("policy.num_train_steps=3",)
_ONE_STEP = ("policy.num_train_steps=1",)
_NO_CONSISTENCY = ("dmd.consistency.weight=0.0",)

VARIANTS = {
  "stage1": {
    "no training": ("train.steps=0",),
    "DMD2": ("dmd.objective=dmd", "dmd.eta=1.0", *_NO_CONSISTENCY),
    "A-DMD, eta 1": ("dmd.eta=1.0", *_NO_CONSISTENCY),
    "A-DMD": _NO_CONSISTENCY,
    "AC-DMD, gamma 0.001": ("dmd.consistency.weight=0.001",),
    "AC-DMD, gamma 0.01": (),
    "AC-DMD, gamma 0.1": ("dmd.consistency.weight=0.1",),
    "AC-DMD, gamma 1": ("dmd.consistency.weight=1.0",),
    "AC-DMD, eta 0": ("dmd.eta=0.0",),
    "AC-DMD, eta 0.5": ("dmd.eta=0.5",),
    "AC-DMD, eta 1": ("dmd.eta=1.0",),
    "AC-DMD without moving average": ("ema.decay=0.0",),
  },
  "stage2": {
    "cold start": ("train.steps=0",),
    "GRPO": (*_POLICY_ALONE, *_ALL_STEPS),
    "SubGRPO, M = 1": (*_POLICY_ALONE, *_ONE_STEP),
    "SubGRPO, M = 2": _POLICY_ALONE,
    # As long as GRPO's 20: an update of GRPO takes 6.0 s of a core, of M = 1 3.9, of M = 2 5.2.
    "SubGRPO, M = 1, 31 updates": (*_POLICY_ALONE, *_ONE_STEP, "train.steps=31"),
    "SubGRPO, M = 2, 23 updates": (*_POLICY_ALONE, "train.steps=23"),
    "last step alone": ("policy.policy_weight=0.0",),
    "GRPO and last step": _ALL_STEPS,
    "M = 1 and last step": _ONE_STEP,
    "M = 2 and last step": (),
    "with LoRA a ~ N(0, 1)": ("lora.init=normal",),
    "with (K - 1) / M": ("policy.subset_factor=true",),
    "with Gaussian log-probability": ("policy.gaussian_log_prob=true",),
    "without moving average": ("ema.decay=0.0",),
    "with adapters in bfloat16": ("lora.dtype=bfloat16",),
  },
}


def run(stage: str, variant: str, seed: int) -> dict:
  """Trains one variant and scores it: means over held-out prompts, and its time."""
  name, common = STAGES[stage]
  config = load_config(str(ROOT / name), [*common, *VARIANTS[stage][variant], f"seed={seed}"])
  start = time.perf_counter()
  with jax.set_mesh(sharding.make_mesh(**config.mesh)):
    setup = build(config)
    state = jax.jit(lambda: initial_state(config, setup))()
    step = make_step(config, setup)
    times = []
    for number in range(config.train.steps):
      begin = time.perf_counter()
      batch, prompts = step_batch(config, setup, number)
      state, _ = jax.block_until_ready(step(state, batch, prompts, number))
      times.append(time.perf_counter() - begin)
    system = systems.generator(setup, config, variant, state.ema)
    held_out = [p for p in setup.held_out for _ in range(IMAGES)]
    evaluator = Evaluator(setup, config)
    images = evaluator.images(system, held_out)
    found = evaluator.scores(images, held_out).values
    scores = {name: float(values.mean()) for name, values in found.items()}
    scores["distance"] = _distance(setup, config, evaluator, images)
  if times:
    scores["update_seconds"] = float(np.median(times))
  return scores | {"seconds": time.perf_counter() - start}


def _distance(setup, config, evaluator, images: np.ndarray) -> float:
  """Squared kernel distance of the images to the teacher's of the same prompts (KID), times 1000.

  Of features of the scoring CLIP, with KID's cubic kernel; unbiased.
  """
  reward = setup.scoring.device["clipscore"].__self__
  params = setup.frozen.rewards["clipscore"]
  of_bytes = lambda params, x: reward.image_features(params, x.astype(jnp.float32) / 255.0)  # noqa: E731
  features = lambda x: np.asarray(jax.jit(of_bytes)(params, x), np.float64)  # noqa: E731
  if not _TEACHER:  # the same for all variants
    _TEACHER.append(features(evaluator.images(systems.teacher(setup, config), setup.held_out)))
  # Sets of one image a prompt, as the teacher's; the mean over these sets.
  return 1000 * float(
    np.mean([_kid(features(images[i::IMAGES]), *_TEACHER) for i in range(IMAGES)])
  )


def _kid(x: np.ndarray, y: np.ndarray) -> float:
  n = len(x)
  kernel = lambda a, b: (a @ b.T + 1.0) ** 3  # noqa: E731
  xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
  within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (n * (n - 1))
  # The same prompt in both sets is left out, as an image and itself are.
  return within - 2 * (xy.sum() - np.trace(xy)) / (n * (n - 1))


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--only", choices=STAGES, action="append", help="stage to run")
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument("--table", action="store_true", help="print the results and run nothing")
  options = parser.parse_args()
  keys, chosen = ("stage", "variant", "seed"), options.only or list(STAGES)
  done = {tuple(row[key] for key in keys) for row in record.read("ablations")}
  for seed in () if options.table else options.seeds:
    for stage in chosen:
      for variant in VARIANTS[stage]:
        place = (stage, variant, seed)
        if place in done:
          continue
        row = dict(zip(keys, place, strict=True)) | run(*place)
        record.write("ablations", [row], keys)
        numbers = "  ".join(f"{key} {value}" for key, value in row.items())
        print(numbers, flush=True)
  for stage in chosen:
    print(f"\n{stage}\n\n{tables.render(TABLES[f'ablations_{stage}'])}")


if __name__ == "__main__":
  main()
