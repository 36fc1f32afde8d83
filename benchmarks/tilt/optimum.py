"""What stage 2 should reach: the minimiser of weighted matching minus weighted reward.

With `normalize=False` the last step's two terms are, up to a common factor, the gradient of

  dmd_weight / d * E_t[ (t / (1 - t))^2 KL(q_t | p_t) ] - reward_weight * E_q[r]

in the law q of the clean samples, with q_t, p_t the student's and the teacher's laws at level t.
"""

import numpy as np
from scipy.optimize import minimize

from benchmarks.tilt.teachers import log_density
from rtdmd_jax.training.settings import DMDConfig


def levels(config: DMDConfig, count: int = 400) -> tuple[np.ndarray, np.ndarray]:
  """Nodes t and weights of the renoise levels above s = 0, with the clamps' point masses."""
  edges = np.linspace(config.offset, config.end, count + 1)
  t = np.clip((edges[1:] + edges[:-1]) / 2, config.min_step, config.max_step) / 1000
  nodes, inverse = np.unique(t, return_inverse=True)
  return nodes, np.bincount(inverse) / count


def gaussian_shift(
  cov: np.ndarray, linear: np.ndarray, config: DMDConfig, dmd_weight: float, reward_weight: float
) -> np.ndarray:
  """How far the linear reward moves the mean of a Gaussian, whose covariance stays, [d]."""
  t, share = levels(config)
  d = len(linear)
  noisy = (1 - t[:, None, None]) ** 2 * cov + t[:, None, None] ** 2 * np.eye(d)
  pull = np.einsum("t,tij->ij", share * t**2, np.linalg.inv(noisy)) * dmd_weight / d
  return np.linalg.solve(pull, reward_weight * linear)


class Grid:
  """Laws on a square grid of `side^2` cells in [-extent, extent]^2."""

  def __init__(self, side: int = 72, extent: float = 4.5):
    self.axis = np.linspace(-extent, extent, side)
    self.points = np.stack(np.meshgrid(self.axis, self.axis, indexing="ij"), -1)

  def blur(self, t: float) -> np.ndarray:
    """One axis of the noising kernel [side, side]: from x0 (columns) to x_t (rows)."""
    kernel = np.exp(-0.5 * np.square((self.axis[:, None] - (1 - t) * self.axis) / t))
    return kernel / kernel.sum(0)

  def law(self, mixture: dict) -> np.ndarray:
    density = np.exp(log_density(mixture, self.points))
    return density / density.sum()


def grid_optimum(
  mixture: dict,
  reward: np.ndarray,
  config: DMDConfig,
  dmd_weight: float,
  reward_weight: float,
  grid: Grid,
  nodes: int = 24,
) -> np.ndarray:
  """The minimiser as probabilities of the grid's cells; reward [side, side].

  Convex in the law, solved for its logarithm relative to the teacher's by L-BFGS.
  """
  prior = grid.law(mixture)
  t, share = levels(config, nodes)
  strength = dmd_weight / 2 * share * (t / (1 - t)) ** 2
  blurs = [grid.blur(x) for x in t]
  noisy = [np.maximum(k @ prior @ k.T, 1e-300) for k in blurs]

  def law(h: np.ndarray) -> np.ndarray:
    log = np.log(prior) + h.reshape(prior.shape)
    q = np.exp(log - log.max())
    return q / q.sum()

  def objective(h: np.ndarray) -> tuple[float, np.ndarray]:
    q = law(h)
    value, slope = -reward_weight * np.sum(q * reward), -reward_weight * reward
    for w, k, p in zip(strength, blurs, noisy, strict=True):
      log = np.log(np.maximum(k @ q @ k.T, 1e-300) / p)
      potential = k.T @ log @ k
      value, slope = value + w * np.sum(q * potential), slope + w * potential
    return value, (q * (slope - np.sum(q * slope))).ravel()

  # Scaled, so that the solver's absolute tolerances mean something.
  scaled = lambda h: tuple(1e3 * part for part in objective(h))  # noqa: E731
  found = minimize(
    scaled, np.zeros(prior.size), jac=True, method="L-BFGS-B",
    options={"maxiter": 600, "maxfun": 800, "maxcor": 30, "ftol": 1e-12, "gtol": 1e-7},
  )  # fmt: skip
  return law(found.x)
