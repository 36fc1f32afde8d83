"""Gaussian mixtures: exact velocities, exact tilted laws and exact kernel distances.

A mixture is a dictionary of `weights` [M], `means` [M, d] and `covs` [M, d, d]; one Gaussian is a
mixture of one. Training reads them as JAX arrays, everything that judges as float64 numpy.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Kernel widths of the distance; each is twice the one before.
WIDTHS = (0.25, 0.5, 1.0, 2.0)

GAUSSIAN = {
  "weights": np.array([1.0]),
  "means": np.array([[0.5, -0.3]]),
  "covs": np.array([[[1.0, 0.45], [0.45, 0.6]]]),
}
MIXTURE = {
  "weights": np.array([0.5, 0.3, 0.2]),
  "means": np.array([[-1.12, -0.7], [1.12, -0.7], [0.0, 1.19]]),
  "covs": np.array(
    [[[0.25, 0.1], [0.1, 0.2]], [[0.2, -0.08], [-0.08, 0.25]], [[0.3, 0.0], [0.0, 0.15]]]
  ),
}


def spectral(mixture: dict) -> dict:
  """What `velocity` reads: covariances as eigenvalues [M, d] and eigenvectors [M, d, d]."""
  values, vectors = np.linalg.eigh(mixture["covs"])
  parts = (np.log(mixture["weights"]), mixture["means"], values, vectors)
  names = ("log_weights", "means", "values", "vectors")
  return {name: jnp.asarray(a, jnp.float32) for name, a in zip(names, parts, strict=True)}


def velocity(base: dict, x: jax.Array, sigma: jax.Array) -> jax.Array:
  """`E[eps - x0 | x]` for `x = (1 - sigma) x0 + sigma eps` [B, d], sigma [B], of `spectral`."""
  scale, noise = (1.0 - sigma)[:, None, None], sigma[:, None, None]
  values, vectors = base["values"], base["vectors"]
  noisy = jnp.square(scale) * values + jnp.square(noise)  # [B, M, d], in the eigenbasis
  gap = jnp.einsum("mij,bmi->bmj", vectors, x[:, None] - scale * base["means"])
  logs = base["log_weights"] - 0.5 * jnp.sum(jnp.square(gap) / noisy + jnp.log(noisy), -1)
  # Within a component x0 and eps are jointly Gaussian with x.
  v = jnp.einsum("mij,bmj->bmi", vectors, (noise - scale * values) * gap / noisy) - base["means"]
  return jnp.sum(jax.nn.softmax(logs, axis=-1)[..., None] * v, axis=1)


def sample(mixture: dict, count: int, rng: np.random.Generator) -> np.ndarray:
  """Independent samples [count, d]."""
  which = rng.choice(len(mixture["weights"]), count, p=mixture["weights"])
  roots = np.linalg.cholesky(mixture["covs"])[which]
  noise = rng.normal(size=(count, mixture["means"].shape[1]))
  return mixture["means"][which] + np.einsum("nij,nj->ni", roots, noise)


def log_density(mixture: dict, x: np.ndarray) -> np.ndarray:
  """[..., d] -> [...]."""
  return np.logaddexp.reduce(_log_parts(mixture, x), axis=-1)


def _log_parts(mixture: dict, x: np.ndarray) -> np.ndarray:
  """Logarithm of each component's weighted density, [..., M]."""
  gap = x[..., None, :] - mixture["means"]
  square = np.einsum("...mi,mij,...mj->...m", gap, np.linalg.inv(mixture["covs"]), gap)
  logdet = np.linalg.slogdet(2 * np.pi * mixture["covs"])[1]
  return np.log(mixture["weights"]) - 0.5 * (square + logdet)


def mode_weights(mixture: dict, x: np.ndarray) -> np.ndarray:
  """Share of samples [N, d] whose nearest mean is each component's, [M]."""
  gap = x[:, None] - mixture["means"]
  nearest = np.argmin(np.square(gap).sum(-1), axis=1)
  return np.bincount(nearest, minlength=len(mixture["weights"])) / len(x)


def moments(mixture: dict) -> tuple[np.ndarray, np.ndarray]:
  """Mean [d] and covariance [d, d]."""
  w, means = mixture["weights"], mixture["means"]
  mean = w @ means
  gap = means - mean
  return mean, np.einsum("m,mij->ij", w, mixture["covs"]) + np.einsum("m,mi,mj->ij", w, gap, gap)


def noised(mixture: dict, sigma: float) -> dict:
  """The law of `(1 - sigma) x0 + sigma eps`."""
  keep, eye = 1 - sigma, np.eye(mixture["means"].shape[1])
  return mixture | {
    "means": keep * mixture["means"], "covs": keep**2 * mixture["covs"] + sigma**2 * eye
  }  # fmt: skip


def tilt(mixture: dict, b: float, linear: np.ndarray, quadratic: float) -> dict:
  """The law `p(x) exp(b r(x)) / Z`, `r(x) = linear . x - quadratic |x|^2 / 2`: a mixture again."""
  d = mixture["means"].shape[1]
  inverse = np.linalg.inv(mixture["covs"])
  covs = np.linalg.inv(inverse + b * quadratic * np.eye(d))
  natural = np.einsum("mij,mj->mi", inverse, mixture["means"])
  tilted = natural + b * linear
  means = np.einsum("mij,mj->mi", covs, tilted)
  logs = np.log(mixture["weights"])
  logs = logs + 0.5 * (np.linalg.slogdet(covs)[1] - np.linalg.slogdet(mixture["covs"])[1])
  logs = logs + 0.5 * (np.sum(tilted * means, -1) - np.sum(natural * mixture["means"], -1))
  weights = np.exp(logs - np.logaddexp.reduce(logs))
  return {"weights": weights, "means": means, "covs": covs}


def own_kernel(x: np.ndarray) -> float:
  """Mean kernel of all pairs of samples [N, d], each with itself included."""
  x = np.asarray(x, np.float32)
  norms, total = np.square(x).sum(1), 0.0
  for part in np.array_split(np.arange(len(x)), max(1, len(x) // 500)):
    square = norms[part, None] + norms - 2 * x[part] @ x.T
    kernel = np.exp(-np.maximum(square, 0) / (2 * WIDTHS[-1] ** 2))
    for _ in WIDTHS:
      total += kernel.sum(dtype=np.float64)
      # Half the width is the fourth power.
      kernel = np.square(np.square(kernel))
  return total / len(WIDTHS) / len(x) ** 2


def _against(mixture: dict, x: np.ndarray, extra: np.ndarray | float = 0.0) -> np.ndarray:
  """Mean kernel of points [N, d], blurred by covariance `extra`, with each component, [N, M]."""
  eye, total = np.eye(x.shape[1]), 0.0
  for width in WIDTHS:
    covs = mixture["covs"] + extra + width**2 * eye
    gap = x[:, None] - mixture["means"]
    square = np.einsum("nmi,mij,nmj->nm", gap, np.linalg.inv(covs), gap)
    total = total + width ** x.shape[1] / np.sqrt(np.linalg.det(covs)) * np.exp(-0.5 * square)
  return total / len(WIDTHS)


def mixture_kernel(mixture: dict) -> float:
  """Mean kernel of two independent draws of the mixture."""
  rows = [
    _against(mixture, mean[None], cov)[0] @ mixture["weights"]
    for mean, cov in zip(mixture["means"], mixture["covs"], strict=True)
  ]
  return float(mixture["weights"] @ np.array(rows))


def mmd(x: np.ndarray, mixture: dict, own: float | None = None) -> float:
  """Kernel distance of samples [N, d] to a mixture; only `x` is sampled, `own` is `own_kernel(x)`.

  The mean over four Gaussian kernels. It counts each sample against itself, so that exact samples
  have about `mmd_floor`.
  """
  own = own_kernel(x) if own is None else own
  cross = np.mean(_against(mixture, x) @ mixture["weights"])
  return float(np.sqrt(max(own - 2 * cross + mixture_kernel(mixture), 0.0)))


def mmd_floor(mixture: dict, count: int) -> float:
  """Root mean square of `mmd` for `count` exact samples."""
  return float(np.sqrt((1 - mixture_kernel(mixture)) / count))


def mixture_mmd(one: dict, other: dict) -> float:
  """Kernel distance of two mixtures, exact."""
  rows = [
    _against(other, mean[None], cov)[0] @ other["weights"]
    for mean, cov in zip(one["means"], one["covs"], strict=True)
  ]
  square = mixture_kernel(one) + mixture_kernel(other) - 2 * one["weights"] @ np.array(rows)
  return float(np.sqrt(max(square, 0.0)))
