r"""The emulator: predictions at a few nodes, interpolated with their covariance and their error.

The whole family n > 0 has one coordinate,

    u = w = lambda_hat^(n - N_max)   in [0, 1]          for n >= N_max (faster than the data),
    u = 2 - n / N_max                in (1, 2)          for n < N_max  (slower than the data),

in which predictions are smooth on either side of u = 1. There they are polynomials through their
nodes: g(u) = sum_j S_j(u) g(u_j). Since all nodes share their random numbers, the Monte Carlo
covariance of g(u) is S Cov S^T with the full covariance over nodes, observables and lags.

Each side begins with a few Chebyshev-Lobatto nodes; `add` puts one more where it matters. The
error of the interpolation itself is known from nodes that were predicted before they were used: if
the polynomial through the other nodes misses node j by e (all outputs at once), the error at u is
taken to be e omega(u) / max |omega|, with omega the product of (u - u_i) over all nodes.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.interpolate import BarycentricInterpolator

from bopito_inverse.inference.prediction import NodePredictions, Prediction

SHORTEST_LAG = 1.0  # frames; no pair of frames is closer
TINY = 1e-100  # the same as u = 0, with an inverse that does not overflow


class Coordinate:
    """The coordinate u of the family n > 0 of a model.

    Args:
        lag_max: longest trained lag N_max.
        lambda_hat: assumed decay per frame.
        slower: whether the step depends on n below N_max.
    """

    def __init__(self, lag_max: int, lambda_hat: float, slower: bool = True) -> None:
        self.lag_max = lag_max
        self.lambda_hat = lambda_hat
        self.low = 0.0
        self.high = 2.0 - SHORTEST_LAG / lag_max if slower else 1.0

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
    """Predictions, their Monte Carlo covariance and interpolation error at any u of an interval.

    Args:
        prediction: what is emulated.
        coordinate: the coordinate u.
        interval: lowest and highest u.
        n_nodes: first nodes on either side of u = 1, where the interval reaches there; at least 3.
    """

    def __init__(
        self,
        prediction: Prediction,
        coordinate: Coordinate,
        interval: tuple[float, float],
        n_nodes: int = 5,
    ) -> None:
        low, high = interval
        edges = [low, 1.0, high] if low < 1 < high else [low, high]
        self.prediction = prediction
        self.coordinate = coordinate
        self.interval = (low, high)
        self._edges = edges
        self._pieces = [_lobatto(a, b, n_nodes) for a, b in pairwise(edges)]
        self._checked = [piece[len(piece) // 2] for piece in self._pieces]
        self.nodes = np.unique(np.concatenate(self._pieces))
        self._store(prediction.at(torch.from_numpy(coordinate.n_int(self.nodes))))
        self._prepare()

    @property
    def n_steps(self) -> int:
        """Composite steps that are emulated."""
        return self.prediction.n_steps

    @property
    def eigenvalue(self) -> int:
        """The column of the second eigenvalue, the last one."""
        return self.value.shape[1] - 1

    def add(self, u: float) -> None:
        """One more node."""
        made = self.prediction.at(torch.from_numpy(self.coordinate.n_int(np.array([u]))))
        where = int(np.searchsorted(self.nodes, u))
        self.nodes = np.insert(self.nodes, where, u)
        value, influence = torch.from_numpy(self.value), self._influence
        parts = (value[:where], made.value, value[where:])
        columns = (influence[:, :where], made.influence, influence[:, where:])
        self._store(NodePredictions(torch.cat(parts), torch.cat(columns, dim=1)))
        i = self._piece(np.array([u]))[0]
        self._pieces[i] = np.sort(np.append(self._pieces[i], u))
        self._checked[i] = u
        self._prepare()

    def remoteness(self, u: np.ndarray) -> np.ndarray:
        """|omega(u)| over its maximum: how far u (G,) is from all nodes, in [0, 1]."""
        return np.abs(self._omega(u))

    def __call__(self, u: np.ndarray, columns: np.ndarray) -> "Emulated":
        """Predictions of columns (L,), each at its own u (G, L)."""
        s = self._weights(u.ravel()).reshape(*u.shape, -1)
        covariance = self._covariance[:, columns][:, :, :, columns]  # (K, L, K, L)
        half = np.einsum("gik,kilj->gilj", s, covariance, optimize=True)
        error = self._missed[self._piece(u.ravel()).reshape(u.shape), columns]
        return Emulated(
            np.einsum("gik,ki->gi", s, self.value[:, columns]),
            np.einsum("gilj,gjl->gij", half, s, optimize=True),
            error * self._omega(u.ravel()).reshape(u.shape),
        )

    def _store(self, made: NodePredictions) -> None:
        self.value, self._influence = made.value.numpy(), made.influence
        n, k, m = made.influence.shape
        flat = made.influence.reshape(n, k * m).numpy()
        self._covariance = (flat.T @ flat / (n * (n - 1))).reshape(k, m, k, m)

    def _prepare(self) -> None:
        """What depends on the nodes alone.

        By how much the other nodes of each piece miss the one that is checked, (pieces, M); the
        polynomials of the nodes; the maximum of |omega|.
        """
        errors = []
        for piece, u in zip(self._pieces, self._checked, strict=True):
            others = piece[piece != u]
            without = BarycentricInterpolator(others, self._at(others))(u)
            errors.append(self._at(np.array([u]))[0] - without)
        self._missed = np.stack(errors)
        self._cardinal = [
            BarycentricInterpolator(piece, np.eye(len(piece))) for piece in self._pieces
        ]
        fine = [np.linspace(piece[0], piece[-1], 20 * len(piece)) for piece in self._pieces]
        self._largest = [
            np.abs(np.prod(u[:, None] - piece, axis=1)).max()
            for u, piece in zip(fine, self._pieces, strict=True)
        ]

    def _at(self, nodes: np.ndarray) -> np.ndarray:
        return self.value[np.searchsorted(self.nodes, nodes)]

    def _piece(self, u: np.ndarray) -> np.ndarray:
        """Which piece each u (G,) belongs to."""
        return np.searchsorted(self._edges[1:-1], u)

    def _omega(self, u: np.ndarray) -> np.ndarray:
        """The product of the distances from all nodes of a piece, over its largest value there."""
        omega, index = np.zeros(len(u)), self._piece(u)
        for i, piece in enumerate(self._pieces):
            own = u[index == i]
            omega[index == i] = np.prod(own[:, None] - piece, axis=1) / self._largest[i]
        return omega

    def _weights(self, u: np.ndarray) -> np.ndarray:
        """S (G, K): the contribution of each node at each u."""
        s = np.zeros((len(u), len(self.nodes)))
        u = np.where(u < TINY, 0.0, u)
        index = self._piece(u)
        for i, piece in enumerate(self._pieces):
            rows = np.flatnonzero(index == i)
            columns = np.searchsorted(self.nodes, piece)
            s[np.ix_(rows, columns)] = self._cardinal[i](u[rows])
        return s


@dataclass(frozen=True)
class Emulated:
    """Predictions of L columns at G points.

    Attributes:
        mean: (G, L).
        covariance: Monte Carlo covariance, (G, L, L).
        error: error of the interpolation, common to all columns but for its size, (G, L).
    """

    mean: np.ndarray
    covariance: np.ndarray
    error: np.ndarray


def _lobatto(low: float, high: float, n: int) -> np.ndarray:
    nodes = low + (high - low) * (1 - np.cos(np.pi * np.arange(n) / (n - 1))) / 2
    nodes[-1] = high
    return nodes
