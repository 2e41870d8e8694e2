r"""Model discrepancy: how far another step, as good as this one, would predict otherwise.

Where the data hold no slow transitions, nothing in them says *how* a molecule crosses: from the
foot of the barrier, or from anywhere in its well. Both kinds of step can have the same relaxation
rate, and differ in all correlations at that rate, which biases the rate that a fit finds. The
discrepancy of a step is the difference from the opposite extreme at the same second eigenvalue,

    d_k(u) = g'_k(lambda_2(u)) - g_k(u),        e = tau d,    tau ~ N(0, sd^2).

For steps that renoise, which cross locally, the opposite is the mixture q mu + (1 - q) T of fresh
draws and the trained model. Its predictions need no sampling: frames forget all at the first fresh
draw, so that with a limit g_0 (w = 0) and the trained part g_T (w = 1) with second eigenvalue
lambda_T,

    g'_k = g_0 + (lambda_2 / lambda_T)^k (g_Tk - g_0).

For steps that interpolate, the opposite is `renoising_step` itself. Where the data hold the slow
process, or all steps agree, d vanishes, and the term with it. The standard deviations are those
seen against exact answers (`tests/benchmarks/bench_steps.py`).
"""

from collections.abc import Callable

import numpy as np
from scipy.interpolate import make_interp_spline

from bopito_inverse.inference.emulator import Coordinate, Emulator

LOCAL_SD, INTERPOLATED_SD = 0.3, 1.0  # of tau, for steps that renoise and for those that do not
TABLE = 201

Alternative = Callable[[np.ndarray], np.ndarray]
"""Predictions (T, M) of another step at second eigenvalues (T,)."""


class Discrepancy:
    """The direction tau d of the discrepancy, in units of its standard deviation.

    Args:
        emulator: predictions of the step.
        alternative: predictions of the other step.
        sd: standard deviation of tau.
    """

    def __init__(self, emulator: Emulator, alternative: Alternative, sd: float) -> None:
        low, high = emulator.interval
        self.sd = sd
        self._u = np.linspace(low, high, TABLE)
        columns = np.arange(emulator.value.shape[1])
        mean = emulator(np.repeat(self._u[:, None], len(columns), 1), columns).mean
        self._d = sd * (alternative(mean[:, emulator.eigenvalue]) - mean)
        self._d[:, emulator.eigenvalue] = 0.0
        self._d[self._u >= 1] = 0.0  # the trained model itself

    def __call__(self, u: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """sd d of columns (L,) at u (B, L), shape (B, L)."""
        position = (u - self._u[0]) / (self._u[1] - self._u[0])
        cell = np.clip(position.astype(int), 0, TABLE - 2)
        fraction = position - cell
        return (1 - fraction) * self._d[cell, columns] + fraction * self._d[cell + 1, columns]


def mixture(pilot: Emulator) -> Alternative:
    """The mixture of fresh draws and the trained part of the step, from w = 0 and w = 1."""
    n = pilot.n_steps
    columns = np.arange(pilot.eigenvalue)
    ends = np.repeat(np.array([[0.0], [1.0]]), len(columns) + 1, axis=1)
    made = pilot(ends, np.append(columns, pilot.eigenvalue)).mean
    limit, trained = made[:, :-1]
    powers = columns % n + 1

    def alternative(eigenvalue: np.ndarray) -> np.ndarray:
        kept = np.clip(eigenvalue / made[1, -1], 0, 1)
        g = limit + kept[:, None] ** powers * (trained - limit)
        return np.column_stack([g, eigenvalue])

    return alternative


def other_step(emulator: Emulator) -> Alternative:
    """Another step, by its own emulator over w in [0, 1]."""
    u = np.linspace(0, 1, TABLE)
    columns = np.arange(emulator.value.shape[1])
    made = emulator(np.repeat(u[:, None], len(columns), 1), columns).mean
    known = np.maximum.accumulate(made[:, -1]) + 1e-9 * np.arange(TABLE)  # increasing
    spline = make_interp_spline(known, made, k=1)
    return lambda eigenvalue: spline(np.clip(eigenvalue, known[0], known[-1]))


def whole_family(coordinate: Coordinate) -> tuple[float, float]:
    """The interval of u on which an alternative is known."""
    return coordinate.low, min(1.0, coordinate.high)
