r"""Transition probabilities between sets, with the covariance of their estimates.

With n_i replicas in set i at the start, and l the label of a replica after some time,

    P_ij = sum_{r from i} 1[l_r = j] / n_i,      dP_ij = sum_{r from i} (1[l_r = j] - P_ij) / n_i

to first order. Several matrices of the same replicas have one joint covariance, and functions of
them follow by the delta method: with d(P^k) = sum_m P^m dP P^(k-1-m), and row-major vectors, for
which vec(A X B) = (A x B^T) vec(X),

    vec(d(P(k) - P(1)^k)) = vec(dP(k)) - sum_m (P(1)^m x (P(1)^(k-1-m))^T) vec(dP(1)),

and with left and right eigenvectors u and v of P, d(lambda) = u^T dP v / (u^T v).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.stats import norm
from torch import Tensor

from bopito_inverse.diagnostics.distances import Statistic, covariance_by_start


class Transitions(NamedTuple):
    """Matrices (n, S, S) and the joint covariance of their estimates, (n S S, n S S)."""

    value: Tensor
    covariance: Tensor

    @property
    def error(self) -> Tensor:
        """Standard errors, shape of `value`."""
        return self.covariance.diagonal().clamp(min=0).sqrt().view_as(self.value)

    def difference(self) -> "Transitions":
        """The first of two matrices minus the second."""
        unit = torch.eye(self.value[0].numel(), dtype=torch.float64)
        return self._linear(self.value[0] - self.value[1], torch.cat([unit, -unit], dim=1))

    def beyond_power(self, k: int) -> "Transitions":
        """P(k) - P(1)^k, where the two matrices are P(1) and P(k)."""
        one, after = self.value
        power = torch.linalg.matrix_power
        slope = sum(
            torch.kron(power(one, m), power(one, k - 1 - m).T.contiguous()) for m in range(k)
        )
        unit = torch.eye(one.numel(), dtype=torch.float64)
        return self._linear(after - power(one, k), torch.cat([-torch.as_tensor(slope), unit], 1))

    def _linear(self, value: Tensor, slope: Tensor) -> "Transitions":
        return Transitions(value[None], slope @ self.covariance @ slope.T)


class Slowest(NamedTuple):
    """Second eigenvalues of two matrices of one lag, and how their timescales compare.

    `p_value` is for equal eigenvalues; `ratio` is the first timescale over the second, with its
    standard error; NaN and inf where an eigenvalue is outside (0, 1).
    """

    eigenvalues: tuple[float, float]
    p_value: float
    ratio: float
    error: float


def transitions(begin: Tensor, ends: Sequence[Tensor], n_sets: int, start: Tensor) -> Transitions:
    """Transition probabilities from sets at the start to sets at later times.

    Args:
        begin: set of each replica at its start, (R,), 0, ..., n_sets - 1; each must occur.
        ends: sets of the replicas at later times, each (R,).
        n_sets: number of sets S.
        start: index of the frame at which each replica begins, (R,), sorted.
    """
    counts = torch.bincount(begin, minlength=n_sets).double()
    pairs = [torch.bincount(begin * n_sets + end, minlength=n_sets**2) for end in ends]
    value = torch.stack(pairs).view(-1, n_sets, n_sets) / counts[:, None]
    landed = torch.stack(list(ends), dim=1)

    def rows(part: slice) -> Tensor:
        i = begin[part]
        row = torch.nn.functional.one_hot(landed[part], n_sets) - value[:, i].transpose(0, 1)
        found = torch.zeros(len(i), len(ends), n_sets, n_sets, dtype=torch.float64)
        found[torch.arange(len(i)), :, i] = row / counts[i, None, None]
        return found.flatten(1)

    return Transitions(value, covariance_by_start(rows, start))


def row_variation(populations: Tensor) -> Statistic:
    """The total variation of rows, 1/2 sum_i mu_i sum_j |D_ij|, of flattened differences."""

    def statistic(difference: Tensor) -> Tensor:
        rows = difference.unflatten(-1, (len(populations), -1)).abs().sum(-1)
        return rows @ populations / 2

    return statistic


def compare_slowest(pair: Transitions) -> Slowest:
    """The slowest process of two matrices of the same lag."""
    (first, slope), (second, other) = (_second_eigenvalue(matrix) for matrix in pair.value)

    def error(a: float, b: float) -> float:
        gradient = torch.cat([a * slope.flatten(), -b * other.flatten()])
        return math.sqrt(max(float(gradient @ pair.covariance @ gradient), 0.0))

    apart = error(1.0, 1.0)
    p_value = float(2 * norm.sf(abs(first - second) / apart)) if apart else float(first == second)
    if not (0 < first < 1 and 0 < second < 1):
        return Slowest((first, second), p_value, math.nan, math.inf)
    rates = math.log(first), math.log(second)
    ratio = rates[1] / rates[0]
    relative = error(1 / (first * rates[0]), 1 / (second * rates[1]))
    return Slowest((first, second), p_value, ratio, ratio * relative)


def _second_eigenvalue(matrix: Tensor) -> tuple[float, Tensor]:
    """lambda_2 and its derivative in the matrix, (S, S)."""
    values, right = torch.linalg.eig(matrix)
    second = int(values.real.argsort(descending=True)[1])
    left = torch.linalg.pinv(right)[second]  # rows of the inverse are left eigenvectors, u v = 1
    return float(values[second].real), torch.outer(left, right[:, second]).real
