r"""Distances between two estimated distributions, with what noise alone would give.

An estimated difference d of probabilities (m,) has the covariance C of a sum over independent
starting frames s, each of which may have begun several replicas,

    d - E[d] = sum_s phi_s,      C = sum_s phi_s phi_s^T.

A distance D = f(d), such as f(d) = 1/2 sum |d|, is above zero even where E[d] = 0. Its *floor* is
its mean over draws of N(0, C), and its p-value the share of these draws that reach D. Noise and
true differences of random sign add in quadrature, so that

    excess = sqrt(D^2 - floor^2)

estimates the distance itself, and the same with D plus 1.645 times its standard error bounds it
from above with 95 % confidence.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Grade = Literal["ok", "small", "unsure", "large"]  # from good to bad
GRADES: tuple[Grade, ...] = get_args(Grade)
Statistic = Callable[[Tensor], Tensor]
"""A distance from differences of probabilities, (..., m) -> (...)."""

N_DRAWS = 9999
ONE_SIDED = 1.645  # standard errors to a 95 % bound
SIGNIFICANT = 0.01
STARTS_PER_BLOCK = 4096


@dataclass(frozen=True)
class Distance:
    """A distance and what it would be if there were no difference.

    Attributes:
        value: the distance as estimated.
        floor: its mean where the two distributions are the same.
        spread: its standard deviation there.
        excess: the distance in excess of the floor, zero or more.
        error: standard error of `excess`.
        upper: the largest distance that noise can hide, 95 % one-sided.
        p_value: chance of a larger `value` where the two distributions are the same.
    """

    value: float
    floor: float
    spread: float
    excess: float
    error: float
    upper: float
    p_value: float

    def __str__(self) -> str:
        return f"{self.excess:.3f} ± {self.error:.3f}"


def measure(
    statistic: Statistic, difference: Tensor, covariance: Tensor, generator: torch.Generator
) -> Distance:
    """The distance of estimated `difference` (m,) of the given `covariance` (m, m), on the CPU."""
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt()
    numbers = torch.randn(N_DRAWS, len(root), generator=generator, dtype=torch.float64)
    noise = numbers @ root.T
    value, null = float(statistic(difference)), statistic(noise)
    reached = int((null >= value).sum())
    floor, error = float(null.mean()), float(statistic(difference + noise).std())
    excess = math.sqrt(max(value**2 - floor**2, 0.0))
    # the error of the square is 2 D e: through the square root, and at zero the root of it
    limit = math.sqrt(2 * value * error)
    return Distance(
        value=value,
        floor=floor,
        spread=float(null.std()),
        excess=excess,
        error=min(value * error / excess, limit) if excess else limit,
        upper=math.sqrt((max(value, floor) + ONE_SIDED * error) ** 2 - floor**2),
        p_value=(1 + reached) / (1 + N_DRAWS),
    )


def covariance_by_start(rows: Callable[[slice], Tensor], start: Tensor) -> Tensor:
    """C = sum_s phi_s phi_s^T, where phi_s sums the rows of all replicas that begin at start s.

    Args:
        rows: contributions (b, m) of a slice of replicas.
        start: index of the start of each replica, (R,), sorted.
    """
    counts = torch.unique_consecutive(start, return_counts=True)[1]
    covariance, first = torch.zeros((), dtype=torch.float64), 0
    for block in counts.split(STARTS_PER_BLOCK):
        last = first + int(block.sum())
        part = rows(slice(first, last))
        where = torch.repeat_interleave(torch.arange(len(block)), block)
        phi = part.new_zeros(len(block), part.shape[1]).index_add_(0, where, part)
        covariance, first = covariance + phi.T @ phi, last
    return covariance


def joint_p_value(p_values: Iterable[float]) -> float:
    """Bonferroni: the smallest of several p-values times their number, at most one."""
    p = list(p_values)
    return min(1.0, len(p) * min(p))


def grade(excess: float, upper: float, p_value: float, tolerance: float) -> Grade:
    """What a distance means in practice, beside being there.

    `ok`: none seen, and none above the tolerance can hide. `small`: one is there, within the
    tolerance. `large`: one is there, above it. `unsure`: noise hides which.
    """
    seen = p_value < SIGNIFICANT
    if excess > tolerance:
        return "large" if seen else "unsure"
    if upper > tolerance:
        return "unsure"
    return "small" if seen else "ok"


def grade_all(distances: Iterable[Distance], p_value: float, tolerance: float) -> Grade:
    """The worst grade of several distances with a joint p-value."""
    return worst_grade(grade(d.excess, d.upper, p_value, tolerance) for d in distances)


def worst_grade(grades: Iterable[Grade]) -> Grade:
    """The most alarming of several grades."""
    return max(grades, key=GRADES.index)


def table(rows: Iterable[tuple[str, Distance]]) -> str:
    """One line for each named distance, under a header."""
    columns = ("distance", "floor", "excess", "below", "p")
    cells = [(name, *_numbers(d)) for name, d in rows]
    width = max(len(name) for name, *_ in cells)
    lines = ["  ".join([" " * width, *(f"{c:>13}" for c in columns)])]
    lines += ["  ".join([f"{c[0]:<{width}}", *(f"{x:>13}" for x in c[1:])]) for c in cells]
    return "\n".join(lines)


def _numbers(d: Distance) -> tuple[str, ...]:
    p = f"{d.p_value:.2g}" if d.p_value > 1 / N_DRAWS else f"< {1 / N_DRAWS:.0e}"
    return f"{d.value:.4f}", f"{d.floor:.4f}", str(d), f"{d.upper:.4f}", p
