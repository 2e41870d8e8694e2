r"""The emulator: predictions at a few nodes, interpolated with their covariance.

The whole family n > 0 has one coordinate,

    u = w = lambda_hat^(n - N_max)   in [0, 1]          for n >= N_max (faster than the data),
    u = 2 - n / N_max                in (1, 2)          for n < N_max  (slower than the data),

in which predictions are smooth on either side of u = 1. There they are polynomials through
Chebyshev-Lobatto nodes: g(u) = sum_j S_j(u) g(u_j). Since all nodes share their random numbers, the
Monte Carlo covariance of g(u) is S Cov S^T with the full covariance over nodes and lags.
"""

import math
from itertools import pairwise

import numpy as np
import torch
from scipy.interpolate import BarycentricInterpolator

from bopito_inverse.inference.prediction import Prediction

SHORTEST_LAG = 1.0  # frames; no pair of frames is closer


class Coordinate:
    """The coordinate u of the family n > 0 of a model."""

    def __init__(self, lag_max: int, lambda_hat: float) -> None:
        self.lag_max = lag_max
        self.lambda_hat = lambda_hat
        self.low = 0.0
        self.high = 2.0 - SHORTEST_LAG / lag_max

    def n_int(self, u: np.ndarray) -> np.ndarray:
        """n at each u; inf at zero."""
        u = np.asarray(u, dtype=np.float64)
        with np.errstate(divide="ignore"):
            above = self.lag_max + np.log(np.clip(u, 0, 1)) / math.log(self.lambda_hat)
        return np.where(u <= 1, above, self.lag_max * (2 - u))

    def from_n_int(self, n: np.ndarray) -> np.ndarray:
        """Coordinate u at each n > 0."""
        n = np.asarray(n, dtype=np.float64)
        above = self.lambda_hat ** np.maximum(n - self.lag_max, 0)
        return np.where(n >= self.lag_max, above, 2 - n / self.lag_max)

    def weight(self, u: np.ndarray) -> np.ndarray:
        """Weight of the dynamic score, one below N_max."""
        return np.minimum(u, 1.0)


class Emulator:
    """Predictions and their Monte Carlo covariance at any u of an interval.

    Args:
        prediction: what is emulated.
        coordinate: the coordinate u.
        interval: lowest and highest u.
        n_nodes: nodes on either side of u = 1, where the interval reaches there.
    """

    def __init__(
        self,
        prediction: Prediction,
        coordinate: Coordinate,
        interval: tuple[float, float],
        n_nodes: int = 7,
    ) -> None:
        low, high = interval
        edges = [low, 1.0, high] if low < 1 < high else [low, high]
        self._pieces = [_lobatto(a, b, n_nodes) for a, b in pairwise(edges)]
        self.interval = (low, high)
        self.coordinate = coordinate
        self.nodes = np.unique(np.concatenate(self._pieces))
        made = prediction.at(torch.from_numpy(coordinate.n_int(self.nodes)))
        self.value = made.value.numpy()  # (K, M)
        n, k, m = made.influence.shape
        flat = made.influence.reshape(n, k * m).numpy()
        self._covariance = (flat.T @ flat / (n * (n - 1))).reshape(k, m, k, m)

    @property
    def n_steps(self) -> int:
        """Composite steps that are emulated; the last column is the second eigenvalue."""
        return self.value.shape[1] - 1

    def __call__(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean (G, M) and Monte Carlo covariance (G, M, M) at u (G,)."""
        s = self._weights(u)
        covariance = np.einsum("gk,kmln,gl->gmn", s, self._covariance, s, optimize=True)
        return s @ self.value, covariance

    def _weights(self, u: np.ndarray) -> np.ndarray:
        """S (G, K): the contribution of each node at each u."""
        u = np.asarray(u, dtype=np.float64)
        s = np.zeros((len(u), len(self.nodes)))
        for piece in self._pieces:
            rows = (u >= piece[0]) & (u <= piece[-1])
            columns = np.searchsorted(self.nodes, piece)
            cardinal = BarycentricInterpolator(piece, np.eye(len(piece)))(u[rows])
            s[np.ix_(rows, columns)] = cardinal
        return s


def _lobatto(low: float, high: float, n: int) -> np.ndarray:
    nodes = low + (high - low) * (1 - np.cos(np.pi * np.arange(n) / (n - 1))) / 2
    nodes[-1] = high
    return nodes
