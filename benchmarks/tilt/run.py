"""Does the algorithm reach the laws that it should? Everything here is known in closed form.

  python -m benchmarks.tilt.run                     # all, over an hour on one slow CPU core
  python -m benchmarks.tilt.run --only=gaussian     # rewrites that section of the results

Writes each row into benchmarks/results/tilt_SECTION.json as soon as it is there.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from scipy.optimize import minimize_scalar

from benchmarks import record
from benchmarks.tilt import estimators, optimum, rounding, teachers, training
from benchmarks.tilt.training import MATCHING, Problem, Training
from rtdmd_jax.training.settings import DMDConfig, PolicyConfig

HISTOGRAM = np.linspace(-3, 3, 41)
BETAS = (0.006, 0.012, 0.024)
LINEAR = Problem(teachers.GAUSSIAN, np.array([0.8, 0.6]), 0.0)
PLACE = Problem(teachers.MIXTURE, np.array([0.4, 1.4]), 1.0)
# The cold start as published: with the normaliser and the consistency term.
COLD = DMDConfig(guidance_low=1.0, guidance_high=1.0)
# Method, beta, training. `QUICK` lets the fake score lag behind the generator, `CAREFUL` does not.
QUICK = Training(2000, fake_updates=5)
CAREFUL = Training(2000, learning_rate=3e-4, fake_updates=20, groups=96)
GAUSSIAN_BETAS = (0.05, 0.1, 0.2, 0.4)
GAUSSIAN_RUNS = [("last step only", beta, QUICK) for beta in GAUSSIAN_BETAS]
GAUSSIAN_RUNS += [("hybrid, KL", 0.2, QUICK), ("hybrid", 0.2, QUICK)]
GAUSSIAN_RUNS += [("last step only", beta, CAREFUL) for beta in GAUSSIAN_BETAS]
GAUSSIAN_RUNS += [("last step only", 0.05, CAREFUL._replace(seed=seed)) for seed in (1, 2)]
EVEN = Training(6000, fake_updates=20, width=128, sigmas=training.EVEN_SIGMAS)
SETS = (12345, 1, 2, 3, 4)  # seeds of the sets of 10,000 samples that a cold start is judged by
SAMPLES = 1_000_000  # of a mean: its own error is then below 1 % of the smallest shift
# Levels up to 0.4 in stage 2 on the mixture.
LOW = MATCHING._replace(end=400.0)
LAST = PolicyConfig(policy_weight=0.0, dmd_weight=1.0, reward_weight=1.0, reward_margin=1e3)
HYBRID = LAST._replace(gaussian_log_prob=True, subset_factor=True)
POLICIES = {
  "last step only": LAST,
  "hybrid": HYBRID,
  "hybrid, KL": HYBRID._replace(kl_weight=10.0),
  "GRPO alone": HYBRID._replace(dmd_weight=0.0, reward_weight=0.0),
  "back-propagation alone": LAST._replace(dmd_weight=0.0),
}


def cold_start(problem: Problem, settings: Training):
  """Stage 1, with the seconds it took, compilation included."""
  begin, fixed = time.time(), training.frozen(problem)
  state = training.start(problem, settings)
  state = training.train_stage1(state, fixed, training=settings, config=COLD)
  state.step.block_until_ready()
  return state, time.time() - begin


def tilted(problem, state, name, beta, config, settings, snapshots=1):
  """Stage 2 of the reward's weight beta; the averaged generators and the seconds.

  The policy term is divided by the reward's deviation in the advantages; its weight puts that back,
  so that it and the last step follow the same reward.
  """
  begin, fixed = time.time(), training.frozen(problem, state.ema, beta)
  clean = training.path(state.ema, training.frozen(problem))[-1]
  weight = beta * problem.reward(clean).std() if name.startswith("hybrid") else 0.0
  weight = 0.1 if name == "GRPO alone" else weight
  _, made = training.train_stage2(
    training.start(problem, settings, state), fixed, weight, training=settings, config=config,
    policy=POLICIES[name], snapshots=snapshots,
  )  # fmt: skip
  jax.block_until_ready(made)
  parts = [jax.tree.map(lambda a, i=i: a[i], made) for i in range(snapshots)]
  return parts, time.time() - begin


def moment_errors(x: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> dict:
  got = np.cov(x.T)
  return {
    "mean": x.mean(0).tolist(), "covariance": got.tolist(),
    "mean_error": float(np.linalg.norm(x.mean(0) - mean)),
    "covariance_error": float(np.linalg.norm(got - cov) / np.linalg.norm(cov)),
  }  # fmt: skip


def gaussian(keep: Callable[[dict], None]) -> None:
  settings = Training(1500)
  state, seconds = cold_start(LINEAR, settings)
  mean, cov = teachers.moments(LINEAR.teacher)
  fixed = training.frozen(LINEAR)
  at = lambda made: training.path(made, fixed, SAMPLES)  # noqa: E731
  start = at(state.ema)[-1]
  out = {
    "teacher": {"mean": mean.tolist(), "covariance": cov.tolist()},
    "floor": teachers.mmd_floor(LINEAR.teacher, 10_000),
    "teacher_in_4_steps": moment_errors(at({})[-1], mean, cov),
    "stage1": moment_errors(start, mean, cov)
    | {"mmd": teachers.mmd(start[:10_000], LINEAR.teacher), "seconds": seconds},
    "stage2": [],
  }
  keep(out)
  for name, beta, settings in GAUSSIAN_RUNS:
    out["stage2"].append(gaussian_row(state, name, beta, settings))
    keep(out)


def gaussian_row(state, name: str, beta: float, settings: Training) -> dict:
  """One stage 2 of `gaussian` against the closed form."""
  mean, cov = teachers.moments(LINEAR.teacher)
  fixed = training.frozen(LINEAR)
  made, seconds = tilted(LINEAR, state, name, beta, MATCHING, settings, snapshots=4)
  shift = optimum.gaussian_shift(cov, LINEAR.linear, MATCHING, 1.0, beta)
  trace = [training.path(m, fixed, SAMPLES) for m in made]
  got = trace[-1][-1].mean(0) - mean
  return {
    "method": name, "beta": beta, "fake_updates": settings.fake_updates,
    "updates": settings.updates, "learning_rate": settings.learning_rate, "seed": settings.seed,
    "seconds": seconds, "shift": got.tolist(),
    "exact_shift": shift.tolist(),
    "shift_error": float(np.linalg.norm(got - shift) / np.linalg.norm(shift)),
    # How far the policy moved the law before the last step, over training.
    "mean_at_half": [float(np.linalg.norm(y[3].mean(0) - 0.5 * mean)) for y in trace],
  } | moment_errors(trace[-1][-1], mean + shift, cov)  # fmt: skip


def nearest_tilt(problem: Problem, x: np.ndarray, own: float) -> tuple[float, dict]:
  """The b >= 0 whose tilted law is nearest to the samples in kernel distance, and that law."""
  law = lambda b: teachers.tilt(problem.teacher, b, problem.linear, problem.quadratic)  # noqa: E731
  found = minimize_scalar(
    lambda b: teachers.mmd(x, law(b), own), bounds=(0.0, 10.0), method="bounded",
    options={"xatol": 1e-3},
  )  # fmt: skip
  return float(found.x), law(found.x)


def judge(problem: Problem, x: np.ndarray, untilted: np.ndarray) -> dict:
  """A law's reward and distances; `ratio` is the bar: to the tilted law, over the untilted's."""
  own = teachers.own_kernel(x)
  b, law = nearest_tilt(problem, x, own)
  distance, before = teachers.mmd(x, law, own), teachers.mmd(untilted, law)
  return {
    "reward": float(problem.reward(x).mean()), "mmd_teacher": teachers.mmd(x, problem.teacher, own),
    "b": b, "mmd_tilted": distance, "untilted_mmd_tilted": before, "ratio": distance / before,
    "mode_weights": teachers.mode_weights(problem.teacher, x).tolist(),
    "tilted_mode_weights": law["weights"].tolist(),
  }  # fmt: skip


def exact(problem: Problem, beta: float, config: DMDConfig, untilted: np.ndarray):
  """The minimiser itself, judged like a generator, and 10,000 samples of it."""
  grid, rng = optimum.Grid(), np.random.default_rng(0)
  law = optimum.grid_optimum(
    problem.teacher, problem.reward(grid.points), config, 1.0, beta, grid, nodes=40
  )
  x = grid.points.reshape(-1, 2)[rng.choice(law.size, 10_000, p=law.ravel())]
  x = x + rng.uniform(-0.5, 0.5, x.shape) * (grid.axis[1] - grid.axis[0])
  return judge(problem, x, untilted), x


def histogram(x: np.ndarray) -> list[int]:
  """Counts of samples [N, 2] in `HISTOGRAM`'s cells, second coordinate first, flat."""
  return np.histogram2d(*x.T, bins=(HISTOGRAM, HISTOGRAM))[0].T.astype(int).ravel().tolist()


def mixture_start(settings: Training) -> tuple[dict, Any, np.ndarray]:
  """One cold start on the mixture: its row, state and samples."""
  fixed, floor = training.frozen(PLACE), teachers.mmd_floor(PLACE.teacher, 10_000)
  state, seconds = cold_start(PLACE, settings)
  sets = [training.path(state.ema, fixed, seed=s, sigmas=settings.sigmas) for s in SETS]
  levels, start = sets[0], sets[0][-1]
  over = [teachers.mmd(x[-1], PLACE.teacher) / floor for x in sets]
  row = {
    "fake_updates": settings.fake_updates, "updates": settings.updates,
    "learning_rate": settings.learning_rate, "samples": settings.groups * settings.repeats,
    "seed": settings.seed, "width": settings.width, "seconds": seconds,
    "mmd_by_level": {
      str(s): teachers.mmd(x, teachers.noised(PLACE.teacher, s))
      for s, x in zip(settings.sigmas[1:], levels[1:], strict=True)
    },
    "mode_weights": teachers.mode_weights(PLACE.teacher, start).tolist(),
    "over_floor": over[0], "over_floor_of_sets": over,
  } | moment_errors(start, *teachers.moments(PLACE.teacher))  # fmt: skip
  return row, state, start


def long(keep: Callable[[dict], None]) -> None:
  keep([mixture_start(Training(6000, 3e-3, 3e-3, 20))[0]])


def even(keep: Callable[[dict], None]) -> None:
  keep([mixture_start(EVEN)[0]])


def mixture_stage2(out: dict, state, start: np.ndarray, keep: Callable[[dict], None]) -> None:
  fixed = training.frozen(PLACE)
  runs = [("last step only", b, 1) for b in BETAS] + [("GRPO alone", 1.0, 8)]
  runs += [("back-propagation alone", 1.0, 8), ("hybrid", 0.012, 4)]
  runs += [("hybrid, KL", b, 1) for b in BETAS]
  for name, beta, snapshots in runs:
    alone = name.endswith("alone")
    settings = Training(320, 1e-3) if alone else Training(2000, 1e-3, 1e-3, 5)
    made, seconds = tilted(PLACE, state, name, beta, LOW, settings, snapshots)
    for i, generator in enumerate(made):
      x = training.path(generator, fixed)[-1]
      row = {"method": name, "beta": beta, "updates": settings.updates * (i + 1) // snapshots}
      out["stage2"].append(judge(PLACE, x, start) | row | {"seconds": seconds})
    if beta in (BETAS[1], 1.0):
      out["histograms"][name] = histogram(x)
    keep(out)


def mixture(keep: Callable[[dict], None]) -> None:
  floor = teachers.mmd_floor(PLACE.teacher, 10_000)
  last = training.path({}, training.frozen(PLACE))[-1]
  out = {"floor": floor, "teacher_in_4_steps": teachers.mmd(last, PLACE.teacher), "stage1": []}
  for fake_updates in (5, 20):
    row, state, start = mixture_start(Training(2000, 3e-3, 3e-3, fake_updates))
    out["stage1"].append(row)
    keep(out)
  drawn = teachers.sample(PLACE.teacher, 10_000, np.random.default_rng(0))
  out["histograms"] = {"teacher": histogram(drawn), "DMD alone": histogram(start)}
  out["stage2"] = [judge(PLACE, start, start) | {"method": "DMD alone", "beta": 0.0}]
  out["tilted_family"] = []
  for b in np.linspace(0, 2, 21):
    law = teachers.tilt(PLACE.teacher, b, PLACE.linear, PLACE.quadratic)
    x = teachers.sample(law, 10_000, np.random.default_rng(1))
    distance = teachers.mixture_mmd(law, PLACE.teacher)
    row = {"b": float(b), "reward": float(PLACE.reward(x).mean()), "mmd_teacher": distance}
    out["tilted_family"].append(row)
  mixture_stage2(out, state, start, keep)
  out["exact"] = []
  for beta in BETAS:
    row, x = exact(PLACE, beta, LOW, start)
    out["exact"].append(row | {"beta": beta})
    if beta == BETAS[1]:
      out["histograms"]["exact optimum"] = histogram(x)
    keep(out)


def facts(keep: Callable[[dict], None]) -> None:
  state, _ = cold_start(PLACE, Training(400, 3e-3, 3e-3, 5))
  out = {}
  for name, measure in (
    ("ambient", lambda: estimators.ambient(PLACE.teacher)),
    ("consistency", lambda: estimators.consistency(PLACE.teacher)),
    ("subgrpo", lambda: estimators.subgrpo(PLACE, state)),
    ("hybrid", lambda: estimators.hybrid(PLACE, state)),
    ("half_precision", lambda: estimators.half_precision(PLACE, state)),
  ):
    begin = time.time()
    out[name] = measure() | {"seconds": time.time() - begin}
    keep(out)


def bfloat16(keep: Callable[[dict], None]) -> None:
  found = rounding.lost_updates()
  rows = found.pop("rows")
  keep([found | row for row in rows])


SECTIONS = {
  "gaussian": gaussian, "mixture": mixture, "long": long, "even": even, "estimators": facts,
  "bfloat16": bfloat16,
}  # fmt: skip


def rows_of(section: dict) -> list[dict]:
  """A section as rows: one per entry of a list, whose `part` names what it belongs to."""
  rows = []
  for name, value in section.items():
    several = isinstance(value, list) and value and isinstance(value[0], dict)
    for entry in value if several else [value]:
      rows.append({"part": name} | (entry if isinstance(entry, dict) else {"value": entry}))
  return rows


def save(name: str, section: dict | list[dict]) -> None:
  """Rewrites one section of the results, five digits per number."""
  print(name, json.dumps(section)[-400:], flush=True)
  rows = section if isinstance(section, list) else rows_of(section)
  short = json.loads(json.dumps(rows), parse_float=lambda s: float(f"{float(s):.5g}"))
  record.write(f"tilt_{name}", short)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--only", choices=SECTIONS, help="one section instead of all")
  only = parser.parse_args().only
  for name in [only] if only else SECTIONS:
    SECTIONS[name](partial(save, name))


if __name__ == "__main__":
  main()
