r"""Model discrepancy: how far another step, as good as this one, would predict otherwise.

Where the data hold no slow transitions, nothing in them says *how* a molecule crosses: from the
foot of the barrier, or from anywhere in its well. Both kinds of step can have the same relaxation
rate, yet differ in how much of an observable relaxes with it, and that biases the rate that a fit
finds. The slow part of the correlation of observable o, with its limit g_o(inf), is

    g_ok - g_o(inf) ~ A_o lambda_2^k,        A_o = sum_k lambda_2^k g_ok / sum_k lambda_2^2k.

The discrepancy of a step is the difference of this amplitude from that of the opposite extreme, at
the same second eigenvalue,

    d_ok(u) = (A'_o(lambda_2) - A_o) lambda_2^k,        e = tau d,    tau ~ N(0, sd^2).

For steps that renoise, which cross locally, the opposite is the mixture q mu + (1 - q) T of fresh
draws and the trained part of the step. It needs no sampling: frames forget all at the first fresh
draw, so that with the predictions g_T of the trained part (w = 1) and its eigenvalue lambda_T

    g'_k = g(inf) + (lambda_2 / lambda_T)^k (g_Tk - g(inf)).

For steps that interpolate, the opposite is `renoising_step` itself. Where the data hold the slow
process, or all steps agree, d vanishes, and the term with it. The standard deviations were
chosen by hand, from the errors of the timescale that `tests/benchmarks/bench_steps.py` lists.
"""

from collections.abc import Callable

import numpy as np
import torch

from bopito_inverse.inference.emulator import Emulator
from bopito_inverse.inference.prediction import Prediction

LOCAL_SD, INTERPOLATED_SD = 0.3, 1.0  # of tau, for steps that renoise and for those that do not
TABLE = 201

Amplitude = Callable[[np.ndarray], np.ndarray]
"""Amplitudes A' (T, n_observables) of another step at second eigenvalues (T,)."""


class Discrepancy:
    """The direction d of the discrepancy, in units of the standard deviation of tau.

    Args:
        emulator: predictions of the step.
        other: amplitudes of the other step.
        sd: standard deviation of tau.
    """

    def __init__(self, emulator: Emulator, other: Amplitude, sd: float) -> None:
        low, high = emulator.interval
        self._u = np.linspace(low, high, TABLE)
        eigenvalue, correlation = _outputs(emulator, self._u)
        limit = uncorrelated(emulator.prediction)
        difference = other(eigenvalue) - _amplitude(correlation - limit[:, None], eigenvalue)
        difference[self._u >= 1] = 0.0  # the trained model itself
        d = sd * difference[..., None] * _decays(eigenvalue, emulator.n_steps)[:, None]
        self._d = np.column_stack([d.reshape(TABLE, -1), np.zeros(TABLE)])

    def __call__(self, u: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """sd d of the columns (L,) of the emulator at u (B, L), shape (B, L)."""
        position = (u - self._u[0]) / (self._u[1] - self._u[0])
        cell = np.clip(position.astype(int), 0, TABLE - 2)
        fraction = position - cell
        return (1 - fraction) * self._d[cell, columns] + fraction * self._d[cell + 1, columns]


def mixture(prediction: Prediction, lag_max: int) -> Amplitude:
    """The mixture of fresh draws and the trained part of the step, by one prediction at w = 1."""
    made = prediction.at(torch.tensor([float(lag_max)])).value[0].numpy()
    limit, trained = uncorrelated(prediction), made[:-1].reshape(-1, prediction.n_steps)
    own = (trained - limit[:, None]) / _decays(made[-1:], prediction.n_steps)

    def amplitude(eigenvalue: np.ndarray) -> np.ndarray:
        decays = _decays(eigenvalue, prediction.n_steps)[:, None]
        return _amplitude(own * decays, eigenvalue)

    return amplitude


def other_step(emulator: Emulator) -> Amplitude:
    """Another step, by its own emulator."""
    eigenvalue, correlation = _outputs(emulator, np.linspace(*emulator.interval, TABLE))
    limit = uncorrelated(emulator.prediction)
    known = _amplitude(correlation - limit[:, None], eigenvalue)
    order = np.argsort(eigenvalue)

    def amplitude(wanted: np.ndarray) -> np.ndarray:
        columns = [np.interp(wanted, eigenvalue[order], column[order]) for column in known.T]
        return np.column_stack(columns)

    return amplitude


def uncorrelated(prediction: Prediction) -> np.ndarray:
    """Correlation of each observable between independent frames of mu, (n_observables,)."""
    starts, weights = prediction.starts, prediction.weights
    return np.array([float(obs.uncorrelated(starts, weights)) for obs in prediction.obs.values()])


def _outputs(emulator: Emulator, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Second eigenvalue (T,) and correlations (T, n_observables, n_steps) at u (T,)."""
    columns = np.arange(emulator.eigenvalue + 1)
    mean = emulator(np.repeat(u[:, None], len(columns), axis=1), columns).mean
    return np.clip(mean[:, -1], 1e-6, 1), mean[:, :-1].reshape(len(u), -1, emulator.n_steps)


def _decays(eigenvalue: np.ndarray, n_steps: int) -> np.ndarray:
    """lambda_2^k for k = 1, ..., n_steps, (T, n_steps)."""
    return np.clip(eigenvalue, 1e-6, 1)[:, None] ** np.arange(1, n_steps + 1)


def _amplitude(correlation: np.ndarray, eigenvalue: np.ndarray) -> np.ndarray:
    """A (T, n_observables) of correlations (T, n_observables, n_steps) less their limit."""
    decays = _decays(eigenvalue, correlation.shape[-1])
    return (correlation * decays[:, None]).sum(-1) / (decays**2).sum(-1)[:, None]
